"""Which form a site takes under a plan, and what it costs then."""

from shallower.planning.forms.form import Form, FormKind, Through, totals
from shallower.planning.forms.forming import form_of
from shallower.planning.forms.steps import Step, steps

__all__ = ["Form", "FormKind", "Step", "Through", "form_of", "steps", "totals"]
