"""Every framing of the package, by one line each; importing this registers them."""

from deltatune.tasks.cloze import ClozeFraming as ClozeFraming
from deltatune.tasks.framing import HeadFraming as HeadFraming
from deltatune.tasks.mixture import MixtureFraming as MixtureFraming
from deltatune.tasks.text2text import TextToTextFraming as TextToTextFraming
from deltatune.tasks.whole import ChatFraming as ChatFraming
from deltatune.tasks.whole import PlainFraming as PlainFraming
