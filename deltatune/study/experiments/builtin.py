"""The experiments that come with the package: importing this enters them."""

from __future__ import annotations

from deltatune.study.experiments import biases as biases
from deltatune.study.experiments import combination as combination
from deltatune.study.experiments import convergence as convergence
from deltatune.study.experiments import diversity as diversity
from deltatune.study.experiments import domain_shift as domain_shift
from deltatune.study.experiments import efficiency as efficiency
from deltatune.study.experiments import forgetting as forgetting
from deltatune.study.experiments import generalization as generalization
from deltatune.study.experiments import languages as languages
from deltatune.study.experiments import low_data as low_data
from deltatune.study.experiments import multi_task as multi_task
from deltatune.study.experiments import performance as performance
from deltatune.study.experiments import prompts as prompts
from deltatune.study.experiments import reading as reading
from deltatune.study.experiments import scale as scale
from deltatune.study.experiments import sequential as sequential
from deltatune.study.experiments import stability as stability
from deltatune.study.experiments import templates as templates
from deltatune.study.experiments import text_to_text as text_to_text
from deltatune.study.experiments import transfer as transfer
