"""Every option of every command, once.

One pydantic model a command, made of sections; one field an option with its type, default and one sentence of help.
The command line, TOML files, `docs/options.md` and the JSON Schema are all derived from these models. Option names are
unique over the sections of a command, so `--network.rank 8` and `--rank 8` mean the same.
"""

from lorasmith.config.drawing import (
    DrawConfig,
    GenerateConfig,
    GridConfig,
    JudgeConfig,
    canny_thresholds,
    share_of_steps,
)
from lorasmith.config.files import ConvertConfig, ExtractConfig, InspectConfig, MergeConfig, ResizeConfig
from lorasmith.config.options import (
    COMMANDS,
    EXPECTED,
    Option,
    build,
    checked,
    dump_toml,
    line_in_toml,
    load_toml,
    nearest,
    options,
    parse_toml,
    read_text,
    sections,
)
from lorasmith.config.pictures import (
    CacheConfig,
    CaptionConfig,
    CaptionsConfig,
    CheckConfig,
    PrepareConfig,
    TagConfig,
    bytes_of,
    seconds_of,
)
from lorasmith.config.sections import (
    DataSection,
    LossSection,
    ModelSection,
    NetworkSection,
    OptimizerSection,
    SampleSection,
    SaveSection,
    TrainingSection,
    options_of_held_out,
)
from lorasmith.config.training import DemoConfig, TrainConfig, separator_contradictions
from lorasmith.config.values import Section, Size

__all__ = [
    "COMMANDS",
    "EXPECTED",
    "CacheConfig",
    "CaptionConfig",
    "CaptionsConfig",
    "CheckConfig",
    "ConvertConfig",
    "DataSection",
    "DemoConfig",
    "DrawConfig",
    "ExtractConfig",
    "GenerateConfig",
    "GridConfig",
    "InspectConfig",
    "JudgeConfig",
    "LossSection",
    "MergeConfig",
    "ModelSection",
    "NetworkSection",
    "OptimizerSection",
    "Option",
    "PrepareConfig",
    "ResizeConfig",
    "SampleSection",
    "SaveSection",
    "Section",
    "Size",
    "TagConfig",
    "TrainConfig",
    "TrainingSection",
    "build",
    "bytes_of",
    "canny_thresholds",
    "checked",
    "dump_toml",
    "line_in_toml",
    "load_toml",
    "nearest",
    "options",
    "options_of_held_out",
    "parse_toml",
    "read_text",
    "seconds_of",
    "sections",
    "separator_contradictions",
    "share_of_steps",
]
