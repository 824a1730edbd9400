"""Every task type of the package, by one line each; importing this registers them."""

from deltatune.tasks.types.choice import Choice as Choice
from deltatune.tasks.types.classification import Classification as Classification
from deltatune.tasks.types.generation import Generation as Generation
from deltatune.tasks.types.mixture import Mixture as Mixture
from deltatune.tasks.types.multilabel import Multilabel as Multilabel
from deltatune.tasks.types.regression import Regression as Regression
from deltatune.tasks.types.span import Span as Span
from deltatune.tasks.types.tagging import Tagging as Tagging
from deltatune.tasks.types.whole import Conversation as Conversation
from deltatune.tasks.types.whole import Plain as Plain
