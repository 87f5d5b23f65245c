"""B-cos networks: piecewise of nothing but input-dependent linear maps, so that W(x) x is the logit."""

from pipeline.models.bcos.classifier import BcosClassifier, build_bcos

__all__ = ["BcosClassifier", "build_bcos"]
