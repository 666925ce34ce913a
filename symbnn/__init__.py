"""symbnn: symmetries in Bayesian neural networks. `import symbnn as sb`; every name below is `sb.name`.

Symmetries of inputs: `rotations`, `rotations_and_flips`, `flips`, `translations` of grids, `point_symmetries` in any
dimension, `natural_action` (the elements of a set in any order, vectors on a lattice); `field` puts pixels and channels
together, `Action` is the type of all others.

Networks: `network_action` derives how a symmetry acts on every weight of any torch network, `unit_permutations` how
hidden units can be exchanged; `rule` teaches it a layer of your own.

Posteriors: `bayesianize` makes a torch network Bayesian, with a symmetry or without; families `MeanFieldGaussian`,
`Laplace`, `LogNormal`, `BlockGaussian`, `FullGaussian`, `PointMass`; priors `isotropic`, `per_tensor`, `random_means`;
`moped` starts at a pretrained network; `Ensemble` is a list of networks, or of samples of a chain; `predict` (with several `Inputs`), `describe`, `variational_tensors`,
`posterior_mean_network`.

Objectives: `elbo`; likelihoods `Categorical` (of inputs or pixels), `Bernoulli`, `Poisson`, `Gaussian`, `StudentT`,
`HeteroscedasticGaussian`; `violations` says which condition of invariance fails.

Equivariance: `Symmetric` is a network with its symmetry, to be expanded, averaged, tied and measured;
`orbit_predictions` and `summarize` measure any predictor, `keep_invariant` projects gradients; `conformal_sets` and
`conformal_intervals` cover in every orientation; `plot_orbit`, `plot_reliability`, `plot_risk_coverage`.

Hidden units and layers: `mutual_information`, `relaxed_network`, `laplace`, `learned_equivariance`.

Data and training: `load`, `load_npz`, `Split`, `Stream` (batches from a loader or a source larger than memory), `train`,
`EarlyStopping`, `TrainingConfig`, `evaluate`, `save_network`, `load_network`.

Whatever cannot be done is refused with a `Refusal`. The book behind each name: https://github.com/symbnn/symbnn.
"""
import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # what type checkers and editors see; at run time a name is imported when it is asked for
    from symbnn.data.own_images import load_npz as load_npz
    from symbnn.data.sources import load as load
    from symbnn.data.splits import Split as Split
    from symbnn.data.streams import Stream as Stream
    from symbnn.equivariance.conditions import violations as violations
    from symbnn.equivariance.conformal import (
        conformal_intervals as conformal_intervals,
        conformal_sets as conformal_sets,
    )
    from symbnn.equivariance.metrics import summarize as summarize
    from symbnn.equivariance.plots import (
        plot_orbit as plot_orbit,
        plot_reliability as plot_reliability,
        plot_risk_coverage as plot_risk_coverage,
    )
    from symbnn.equivariance.predictions import orbit_predictions as orbit_predictions
    from symbnn.equivariance.projected_gradients import keep_invariant as keep_invariant
    from symbnn.equivariance.symmetric import Symmetric as Symmetric, bayesianize as bayesianize
    from symbnn.errors import Refusal as Refusal
    from symbnn.hidden_units.mutual_information import mutual_information as mutual_information
    from symbnn.layerwise.evidence import laplace as laplace
    from symbnn.layerwise.precisions import learned_equivariance as learned_equivariance
    from symbnn.layerwise.relaxed_networks import relaxed_network as relaxed_network
    from symbnn.posterior.block_gaussian import BlockGaussian as BlockGaussian
    from symbnn.posterior.calls import Inputs as Inputs
    from symbnn.posterior.describing import describe as describe
    from symbnn.posterior.elbo import elbo as elbo
    from symbnn.posterior.ensembles import Ensemble as Ensemble
    from symbnn.posterior.full_gaussian import FullGaussian as FullGaussian
    from symbnn.posterior.independent import Laplace as Laplace, MeanFieldGaussian as MeanFieldGaussian
    from symbnn.posterior.layers import (
        posterior_mean_network as posterior_mean_network,
        variational_tensors as variational_tensors,
    )
    from symbnn.posterior.likelihoods import (
        Bernoulli as Bernoulli,
        Categorical as Categorical,
        Poisson as Poisson,
    )
    from symbnn.posterior.log_normal import LogNormal as LogNormal
    from symbnn.posterior.moped import moped as moped
    from symbnn.posterior.point_mass import PointMass as PointMass
    from symbnn.posterior.priors import (
        isotropic as isotropic,
        per_tensor as per_tensor,
        random_means as random_means,
    )
    from symbnn.posterior.real_targets import (
        Gaussian as Gaussian,
        HeteroscedasticGaussian as HeteroscedasticGaussian,
        StudentT as StudentT,
    )
    from symbnn.posterior.sampling import predict as predict
    from symbnn.symmetry.actions import Action as Action, natural_action as natural_action
    from symbnn.symmetry.fields import (
        field as field,
        flips as flips,
        point_symmetries as point_symmetries,
        rotations as rotations,
        rotations_and_flips as rotations_and_flips,
        translations as translations,
    )
    from symbnn.symmetry.networks import (
        network_action as network_action,
        unit_permutations as unit_permutations,
    )
    from symbnn.symmetry.teaching import rule as rule
    from symbnn.training.callbacks import EarlyStopping as EarlyStopping
    from symbnn.training.checkpoints import load_network as load_network, save_network as save_network
    from symbnn.training.config import TrainingConfig as TrainingConfig
    from symbnn.training.evaluation import evaluate as evaluate
    from symbnn.training.loop import train as train

_NAMES = {  # the same by module; a test compares the two
    "data.own_images": "load_npz",
    "data.sources": "load",
    "data.splits": "Split",
    "data.streams": "Stream",
    "equivariance.conditions": "violations",
    "equivariance.conformal": "conformal_intervals conformal_sets",
    "equivariance.metrics": "summarize",
    "equivariance.plots": "plot_orbit plot_reliability plot_risk_coverage",
    "equivariance.predictions": "orbit_predictions",
    "equivariance.projected_gradients": "keep_invariant",
    "equivariance.symmetric": "Symmetric bayesianize",
    "errors": "Refusal",
    "hidden_units.mutual_information": "mutual_information",
    "layerwise.evidence": "laplace",
    "layerwise.precisions": "learned_equivariance",
    "layerwise.relaxed_networks": "relaxed_network",
    "posterior.block_gaussian": "BlockGaussian",
    "posterior.calls": "Inputs",
    "posterior.describing": "describe",
    "posterior.ensembles": "Ensemble",
    "posterior.elbo": "elbo",
    "posterior.full_gaussian": "FullGaussian",
    "posterior.independent": "Laplace MeanFieldGaussian",
    "posterior.layers": "posterior_mean_network variational_tensors",
    "posterior.likelihoods": "Bernoulli Categorical Poisson",
    "posterior.log_normal": "LogNormal",
    "posterior.moped": "moped",
    "posterior.point_mass": "PointMass",
    "posterior.priors": "isotropic per_tensor random_means",
    "posterior.real_targets": "Gaussian HeteroscedasticGaussian StudentT",
    "posterior.sampling": "predict",
    "symmetry.actions": "Action natural_action",
    "symmetry.fields": "field flips point_symmetries rotations rotations_and_flips translations",
    "symmetry.networks": "network_action unit_permutations",
    "symmetry.teaching": "rule",
    "training.callbacks": "EarlyStopping",
    "training.checkpoints": "load_network save_network",
    "training.config": "TrainingConfig",
    "training.evaluation": "evaluate",
    "training.loop": "train",
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names.split()}
_ROOMS = ("symmetry", "posterior", "equivariance", "hidden_units", "layerwise", "data", "training", "studies", "adapters")
__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    """A name of the face, or a room, imported when it is first asked for."""
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"symbnn has no name {name!r}; dir(symbnn) lists what it has")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What tab completion shows."""
    return sorted([*__all__, *_ROOMS, "__version__", "__doc__"])
