"""Every option, its default and its limits, as frozen dataclasses.

A section with a `kind` is one of several dataclasses (verbs.KINDS); the kind is the name of the YAML
file in its group of conf/. Sections are built from composed YAML by builder.py.
"""

from pipeline.config.augment import (
    AugmentConfig,
    OperationConfig,
)
from pipeline.config.cells_data import CellsDataConfig
from pipeline.config.cluster import (
    ClusterConfig,
    Executor,
    ExistingClusterConfig,
    KubeRayClusterConfig,
    LocalClusterConfig,
)
from pipeline.config.data import (
    DataConfig,
    DemoDataConfig,
    DigitsDataConfig,
    ImageFolderDataConfig,
    ImageTableDataConfig,
    TinyImageNetDataConfig,
    TorchvisionDataConfig,
    WebDatasetDataConfig,
)
from pipeline.config.distilling import DistillConfig, MethodConfig
from pipeline.config.errors import (
    ConfigError,
    require,
    require_fraction,
)
from pipeline.config.feature_methods import (
    ATConfig,
    CatKDConfig,
    CRDConfig,
    FeatureKDConfig,
    FTConfig,
    ReviewKDConfig,
    SSKDConfig,
)
from pipeline.config.file_data import FileDataConfig
from pipeline.config.judges import DistanceCorrelationOptions, UnicamOptions
from pipeline.config.judging import (
    EvaluateOptions,
    JudgeName,
    ReportOptions,
)
from pipeline.config.methods import (
    E2KDConfig,
    KDConfig,
    KEDConfig,
    LabelsConfig,
    SoftTargetsConfig,
)
from pipeline.config.models import (
    PRETRAINED,
    AdditiveModelConfig,
    BcosModelConfig,
    BcosWeightsConfig,
    CifarModelConfig,
    ExplainerConfig,
    GradCamConfig,
    ModelConfig,
    NetworkConfig,
    NoModelConfig,
    SuperfeaturesConfig,
    TimmModelConfig,
    TorchvisionModelConfig,
    is_published,
)
from pipeline.config.store import (
    PassConfig,
    StoreConfig,
    SubsetConfig,
)
from pipeline.config.study import (
    ClassSimilarityOptions,
    DiffroarOptions,
    DissectionOptions,
    FiveBandOptions,
    GradientAlignmentOptions,
)
from pipeline.config.table_data import (
    ALL_COLUMNS,
    SklearnTableDataConfig,
    TableDataConfig,
)
from pipeline.config.teaching import (
    GuidedTeachingConfig,
    KEDTeachingConfig,
    LabelTeachingConfig,
    TeachingConfig,
)
from pipeline.config.training import (
    OptimizerConfig,
    TrainerConfig,
)
from pipeline.config.verbs import (
    KINDS,
    VERBS,
    EvaluateConfig,
    PrecomputeConfig,
    RenderConfig,
    ReportConfig,
    SweepConfig,
    TeachConfig,
    VerifyConfig,
)
from pipeline.config.views import (
    AnyViewsConfig,
    CanonicalViewsConfig,
    RandomViewsConfig,
    RotationsViewsConfig,
)

__all__ = [
    "ALL_COLUMNS",
    "KINDS",
    "PRETRAINED",
    "VERBS",
    "ATConfig",
    "AdditiveModelConfig",
    "AnyViewsConfig",
    "AugmentConfig",
    "BcosModelConfig",
    "BcosWeightsConfig",
    "CRDConfig",
    "CanonicalViewsConfig",
    "CatKDConfig",
    "CellsDataConfig",
    "CifarModelConfig",
    "ClassSimilarityOptions",
    "ClusterConfig",
    "ConfigError",
    "DataConfig",
    "DemoDataConfig",
    "DiffroarOptions",
    "DigitsDataConfig",
    "DissectionOptions",
    "DistanceCorrelationOptions",
    "DistillConfig",
    "E2KDConfig",
    "EvaluateConfig",
    "EvaluateOptions",
    "Executor",
    "ExistingClusterConfig",
    "ExplainerConfig",
    "FTConfig",
    "FeatureKDConfig",
    "FileDataConfig",
    "FiveBandOptions",
    "GradCamConfig",
    "GradientAlignmentOptions",
    "GuidedTeachingConfig",
    "ImageFolderDataConfig",
    "ImageTableDataConfig",
    "JudgeName",
    "KDConfig",
    "KEDConfig",
    "KEDTeachingConfig",
    "KubeRayClusterConfig",
    "LabelTeachingConfig",
    "LabelsConfig",
    "LocalClusterConfig",
    "MethodConfig",
    "ModelConfig",
    "NetworkConfig",
    "NoModelConfig",
    "OperationConfig",
    "OptimizerConfig",
    "PassConfig",
    "PrecomputeConfig",
    "RandomViewsConfig",
    "RenderConfig",
    "ReportConfig",
    "ReportOptions",
    "ReviewKDConfig",
    "RotationsViewsConfig",
    "SSKDConfig",
    "SklearnTableDataConfig",
    "SoftTargetsConfig",
    "StoreConfig",
    "SubsetConfig",
    "SuperfeaturesConfig",
    "SweepConfig",
    "TableDataConfig",
    "TeachConfig",
    "TeachingConfig",
    "TimmModelConfig",
    "TinyImageNetDataConfig",
    "TorchvisionDataConfig",
    "TorchvisionModelConfig",
    "TrainerConfig",
    "UnicamOptions",
    "VerifyConfig",
    "WebDatasetDataConfig",
    "is_published",
    "require",
    "require_fraction",
]
