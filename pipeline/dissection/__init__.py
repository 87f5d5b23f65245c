"""Network dissection (Bau et al. 2017): which units of a layer fire where a concept is.

Sets of concepts, with labels for pixels or for whole images; the thresholds above which a unit fires; and the counts of
pixels that say how well the places where it fires and those of a concept agree.
"""
