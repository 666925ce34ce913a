"""A study of eight small runs, for the tests of the studies."""
from symbnn.studies.evaluations import Evaluation
from symbnn.studies.grids import Study
from symbnn.studies.runs import NetworkRun
from symbnn.studies.tasks import Setup
from symbnn.training.config import TrainingConfig

BASE = NetworkRun(Setup(channels=(2, 4), train_size=64), TrainingConfig(epochs=2, batch_size=64, learning_rate=0.02),
                  evaluation=Evaluation(images=20, draws=4))
TINY = Study("tiny", "none", BASE, ({"method.name": ("baseline", "orbit_mixture")},
                                    {"method.name": ("block_diagonal",), "method.trigger": (0, 1)}),
             seeds=(0, 1), series=("method.trigger",))


def without_seconds(records):
    """Records without what the clock says."""
    return [{name: value for name, value in record.items() if not name.endswith("_seconds")} for record in records]
