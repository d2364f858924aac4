"""k8s/observability/prometheusrule.yaml out of the rules beside it: kustomize can wrap a file in a ConfigMap only.

python -m tests.support.prometheus_rule
"""

import textwrap
from pathlib import Path

OBSERVABILITY = Path(__file__).parents[2] / "k8s" / "observability"
RULES = OBSERVABILITY / "rules.yaml"
WRAPPED = OBSERVABILITY / "prometheusrule.yaml"

_HEADER = """\
# rules.yaml as the Prometheus operator wants it; made by `python -m tests.support.prometheus_rule`, not by hand.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: octavo
spec:
"""


def wrapped(rules: str) -> str:
    """The PrometheusRule for a file of Prometheus's rules."""
    return _HEADER + textwrap.indent(rules, "  ")


if __name__ == "__main__":
    WRAPPED.write_text(wrapped(RULES.read_text()))
