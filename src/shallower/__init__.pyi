"""The public names, once: `__init__.py` imports each when it is first used."""

from .calibrating.varying import varied as varied
from .core.inputs import Inputs as Inputs
from .errors import ShallowerError as ShallowerError
from .finding.matching import find_sites as find_sites
from .measuring.measurement import Measurement as Measurement
from .measuring.measurement import compare as compare
from .measuring.measurement import measure as measure
from .methods.collapsing.layer_collapse import LayerCollapse as LayerCollapse
from .methods.collapsing.layer_folding import LayerFolding as LayerFolding
from .methods.collapsing.stages import Stages as Stages
from .methods.dropout.options import DropoutOptions as DropoutOptions
from .methods.dropout.structural_dropout import StructuralDropout as StructuralDropout
from .methods.squeezing.squeeze import squeeze as squeeze
from .methods.tlc.choosing import choose_forms as choose_forms
from .methods.tlc.till_layers_collapse import Pace as Pace
from .methods.tlc.till_layers_collapse import TillLayersCollapse as TillLayersCollapse
from .planning.curve import Curve as Curve
from .planning.entries import Entry as Entry
from .planning.entries import Fate as Fate
from .planning.entries import Fit as Fit
from .planning.moving import worth_moving as worth_moving
from .planning.plan import Plan as Plan
from .planning.targets import Target as Target
from .saving.checkpoint import load as load
from .saving.checkpoint import save as save
from .saving.exporting import Exported as Exported
from .saving.exporting import export as export
from .sites.collection import Sites as Sites
from .sites.parts import Between as Between
from .sites.parts import Heads as Heads
from .sites.parts import LinearMap as LinearMap
from .sites.parts import Place as Place
from .sites.parts import Residual as Residual
from .sites.site import Site as Site
from .surgery.applying import apply as apply
from .surgery.padding import border_error as border_error
from .surgery.padding import move_padding as move_padding
from .surgery.simulation import simulate as simulate
from .training.healing import Matching as Matching
from .training.healing import heal as heal
from .training.loop import train as train
from .training.recipe import Checkpoint as Checkpoint
from .training.recipe import History as History
from .training.recipe import Recipe as Recipe

__version__: str
