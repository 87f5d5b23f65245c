"""Small CSV with the header of Unicauca's flows and similar values."""

import csv

import numpy as np

_NAMES = """
Flow.ID Source.IP Source.Port Destination.IP Destination.Port Protocol Timestamp Flow.Duration
Total.Fwd.Packets Total.Backward.Packets Total.Length.of.Fwd.Packets Total.Length.of.Bwd.Packets
Fwd.Packet.Length.Max Fwd.Packet.Length.Min Fwd.Packet.Length.Mean Fwd.Packet.Length.Std Bwd.Packet.Length.Max
Bwd.Packet.Length.Min Bwd.Packet.Length.Mean Bwd.Packet.Length.Std Flow.Bytes.s Flow.Packets.s Flow.IAT.Mean
Flow.IAT.Std Flow.IAT.Max Flow.IAT.Min Fwd.IAT.Total Fwd.IAT.Mean Fwd.IAT.Std Fwd.IAT.Max Fwd.IAT.Min
Bwd.IAT.Total Bwd.IAT.Mean Bwd.IAT.Std Bwd.IAT.Max Bwd.IAT.Min Fwd.PSH.Flags Bwd.PSH.Flags Fwd.URG.Flags
Bwd.URG.Flags Fwd.Header.Length Bwd.Header.Length Fwd.Packets.s Bwd.Packets.s Min.Packet.Length
Max.Packet.Length Packet.Length.Mean Packet.Length.Std Packet.Length.Variance FIN.Flag.Count SYN.Flag.Count
RST.Flag.Count PSH.Flag.Count ACK.Flag.Count URG.Flag.Count CWE.Flag.Count ECE.Flag.Count Down.Up.Ratio
Average.Packet.Size Avg.Fwd.Segment.Size Avg.Bwd.Segment.Size Fwd.Header.Length.1 Fwd.Avg.Bytes.Bulk
Fwd.Avg.Packets.Bulk Fwd.Avg.Bulk.Rate Bwd.Avg.Bytes.Bulk Bwd.Avg.Packets.Bulk Bwd.Avg.Bulk.Rate
Subflow.Fwd.Packets Subflow.Fwd.Bytes Subflow.Bwd.Packets Subflow.Bwd.Bytes Init_Win_bytes_forward
Init_Win_bytes_backward act_data_pkt_fwd min_seg_size_forward Active.Mean Active.Std Active.Max Active.Min
Idle.Mean Idle.Std Idle.Max Idle.Min Label L7Protocol ProtocolName
"""
HEADER = _NAMES.split()
APPLICATIONS = {"GOOGLE": 126, "HTTP": 7, "SKYPE": 125}


def write_unicauca(path, rows, seed=0):
    """Write flows. The fifth and the tenth have the duration 0 and the rates Infinity and NaN, as of CICFlowMeter."""
    generator = np.random.default_rng(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for number in range(rows):
            name = str(generator.choice(list(APPLICATIONS)))
            source, port = f"172.19.1.{number % 200}", int(generator.integers(1024, 65536))
            row = dict.fromkeys(HEADER, "0")
            for column in HEADER[7:84]:
                heavy = np.exp(generator.normal(list(APPLICATIONS).index(name) * 2, 4))
                row[column] = (
                    f"{heavy:.6f}" if column.endswith(("Mean", "Std", ".s")) else int(heavy)
                )
            row |= {
                "Flow.ID": f"{source}-10.200.7.7-{port}-3128-6",
                "Source.IP": source,
                "Source.Port": port,
                "Destination.IP": "10.200.7.7",
                "Destination.Port": int(generator.choice([80, 443, 3128])),
                "Protocol": int(generator.choice([0, 6, 17])),
                "Timestamp": f"26/04/201711:11:{number % 60:02d}",
                "Init_Win_bytes_forward": -1 if number % 7 == 0 else 29200,
                "Label": "BENIGN",
                "L7Protocol": APPLICATIONS[name],
                "ProtocolName": name,
            }
            if number in (4, 9):
                row |= {"Flow.Duration": 0, "Flow.Bytes.s": "Infinity" if number == 4 else "NaN"}
            writer.writerow(row.values())
    return path
