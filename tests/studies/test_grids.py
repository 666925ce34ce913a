"""Grids: values, combinations, words, and comparisons at equal budget."""
import json
from dataclasses import replace

import pytest

from helpers_studies import BASE, TINY
from symbnn.errors import Refusal
from symbnn.studies.grids import DEMO, Comparison, Panel, Study, run_in_words, words
from symbnn.studies.methods import METHODS, Average, Expansion
from symbnn.studies.runs import FunctionRun, task_of
from symbnn.studies.simulations import SIMULATIONS
from symbnn.studies.tasks import Setup, epoch_cost

SETUP = Setup(channels=(2, 4), train_size=64)
COMPARED = Comparison(SETUP, replace(DEMO, epochs=2, batch_size=64), small_epochs=3, methods=("baseline", "regular"),
                      seeds=(0,), evaluation_draws=4, images=20)


@pytest.mark.parametrize("change, reason", [
    ({"grids": ()}, "a grid"),
    ({"seeds": ()}, "seeds"),
    ({"seeds": (0, 0)}, "named once"),
    ({"seeds": (-1,)}, "as each seed of a study"), ({"seeds": (2**63,)}, "below 2"),
    ({"x": "setup.group"}, "among what the grids vary"),
    ({"series": ("method.projected",)}, "among what the grids vary"),
    ({"only": (("setup.group", "C4"),)}, "among what the grids vary"),
    ({"grids": ({"method.name": ("baseline", "baseline")},), "series": ()}, "each run once"),
    ({"grids": ({"method.name": ("magic",)},), "series": ()}, "as method"),
    ({"grids": ({"method.title": ("a",)},), "series": ()}, "part and its field"),
    ({"grids": ({"network.depth": (1,)},), "series": ()}, "part and its field"),
    ({"grids": ({"setup.family": ("normal",)},), "series": ()}, "as family"),
])
def test_studies_that_cannot_be_meant_are_refused(change, reason):
    with pytest.raises(Refusal, match=reason):
        replace(TINY, **change)


EDITS = [
    (lambda whole: whole.pop("title"), "nothing at title"),
    (lambda whole: whole.update(colour="red"), "at colour"),
    (lambda whole: whole.update(grids=3), "3 at grids"),
    (lambda whole: whole.update(seeds=["0"]), "'0' at seeds.0"),
    (lambda whole: whole.update(panels=[{"metrics": "accuracy"}]), "at panels.0.metric"),
    (lambda whole: whole["base"]["setup"].update(depth=3), "3 at depth"),
    (lambda whole: whole["base"]["setup"].update(dataset=5), "5 at dataset"),
    (lambda whole: whole["base"]["setup"].update(channels=[4, "8"]), "'8' at channels.1"),
    (lambda whole: whole["base"]["training"].update(epochs=2.5), "2.5 at epochs"),
    (lambda whole: whole["base"].update(training=[1]), "[1] at the whole"),
    (lambda whole: whole["base"].update(method={"name": "wide", "trigger": 1}), "1 at trigger"),
    (lambda whole: whole["base"].update(method="wide"), "'wide' at the whole"),
    (lambda whole: whole["base"].update(extra={}), "extra"),
    (lambda whole: whole["base"].pop("setup") and whole["base"].update(function="width"), "nothing at settings"),
]


@pytest.mark.parametrize("edit, place", EDITS)
def test_edited_texts_are_refused(edit, place):
    whole = TINY.values()
    edit(whole)
    with pytest.raises(Refusal) as caught:
        Study.from_json(json.dumps(whole))
    assert place in caught.value.got


def test_studies_survive_json():
    simulation = Study("A", "none", FunctionRun("width"), ({"units": (4, 8), "method": ("bethe",)},), x="units",
                       only=(("method", "bethe"),), panels=(Panel("per_unit", slope=-1),))
    elsewhere = replace(TINY, base=BASE.changed({"training.device": "cuda:1"}))
    for study in (TINY, simulation, COMPARED.study(), elsewhere):
        assert Study.from_json(json.dumps(study.values())) == study
        assert Study.from_json(json.dumps(study.values(), indent=1)).runs() == study.runs()


def test_grids_give_every_combination_once_and_in_order():
    assert [(run.method.name, run.method.trigger) for run in TINY.points()] == [
        ("baseline", 0), ("orbit_mixture", 0), ("block_diagonal", 0), ("block_diagonal", 1)]
    assert [run.seed for run in TINY.runs()] == [0, 1] * 4
    calls = Study("B", "none", FunctionRun("toy"), ({"a": (1, 2)}, {"a": (3,), "b": (0, 1)}), (0, 2), x="a")
    assert [dict(run.given) for run in calls.points()] == [{"a": 1}, {"a": 2}, {"a": 3, "b": 0}, {"a": 3, "b": 1}]
    assert calls.columns == ("a", "b") and run_in_words(calls, calls.runs()[-1]) == "a 3, b 1, seed 2"


def test_words_name_what_has_no_name_of_its_own():
    names = ("method.name", "method.trigger", "method.keep_moments", "method.projected", "setup.validation_size")
    assert words(names, ("geometric", 20, True, False, None)) == "geometric, trigger 20, keep moments"
    assert words(("training.epochs", "before.epochs"), (11, 40)) == "epochs 11, epochs before 40"
    study = replace(TINY, grids=({"setup.channels": ((3,), (2, 4))},), seeds=(0,), x="setup.channels", series=())
    assert [run_in_words(study, run) for run in study.runs()] == ["channels 3, seed 0", "channels 2 4, seed 0"]


# Equal budget


@pytest.mark.parametrize("estimator", ["split", "whole", "flipout"])
@pytest.mark.parametrize("group", ["C4", "D4"])
def test_budgets_are_equal_and_the_baseline_gets_no_less(group, estimator):
    training = replace(COMPARED.training, estimator=estimator)
    names = ("baseline", "wide", "orbit_mixture", "regular", "block_diagonal+projected", "geometric", "tied_small",
             *(("row_rolled", "tied") if group == "C4" else ()))
    study = replace(COMPARED, setup=replace(SETUP, group=group), training=training, methods=names).study()
    task, _ = task_of(study.base, None)
    order = task.action.group.order
    each = {width: epoch_cost(task, width, training) for width in (1, order)}
    budget = 3 * each[1] + 2 * each[order]
    assert tuple(str(run.method) for run in study.points()) == names
    for run in study.points():
        width, changes = run.method.widths(order)[1], isinstance(run.method, (Average, Expansion))
        spent = run.training.epochs * each[width] + (run.before.epochs * each[1] if run.before else 0)
        assert budget <= spent < budget + each[width] and (run.before is not None) == changes
        assert not changes or run.before == replace(training, epochs=3)
        assert run.training.learning_rate == (0.02 if width == 1 else 0.015)
        assert spent == budget or not isinstance(run.method, Expansion)


@pytest.mark.parametrize("change, reason", [
    ({"methods": ("magic",)}, "one of baseline.* as method"),
    ({"methods": ("regular", "regular")}, "once"),
    ({"methods": ()}, "a grid"),
    ({"seeds": (1, 1)}, "once"),
    ({"seeds": (-1,)}, "as each seed"),
    ({"split": "train"}, "one of test.* as split"),
    ({"evaluation_draws": 2}, "need three"),
    ({"small_epochs": 0}, "before the expansion"),
    ({"images": 0}, "number of images"),
    ({"expanded_learning_rate": 0.0}, "positive number"),
    ({"setup": replace(SETUP, group="shifts")}, "circular"),
])
def test_comparisons_that_cannot_be_meant_are_refused(change, reason):
    with pytest.raises(Refusal, match=reason):
        replace(COMPARED, **change).study()


def test_every_method_has_a_place_in_a_comparison():
    names = tuple(METHODS)
    assert [run.method.name for run in replace(COMPARED, methods=names).study().points()] == list(names)
    assert COMPARED.study().base == COMPARED.base and BASE.evaluation != COMPARED.base.evaluation


# What a figure could stumble over


SWEPT = replace(TINY, base=BASE.changed({"evaluation.sweep": (1, 2, 4)}), x="draws", panels=(Panel("defect_plugin"),))
assert "width" in SIMULATIONS  # so the function is known
WIDTH = Study("A", "none", FunctionRun("width"), ({"units": (4, 8), "method": ("bethe",), "separation": (1.0,)},),
              x="units", panels=(Panel("per_unit"),))


@pytest.mark.parametrize("study, change, reason", [
    (TINY, {"panels": ()}, "a panel at least"),
    (TINY, {"panels": (Panel("acuracy"),)}, r"Fix: Panel\('accuracy'\)"),
    (TINY, {"panels": (Panel("accuracy"), Panel("elbo_of_mixture"))}, "what the runs measure"),
    (TINY, {"panels": (Panel("log_evidence"),)}, "what the runs measure"),
    (TINY, {"panels": (Panel("information_method"),)}, "what the runs measure"),
    (TINY, {"base": BASE.changed({"setup.group": "none"}), "panels": (Panel("orbit_agreement"),)}, "what the runs"),
    (SWEPT, {"panels": (Panel("accuracy"),)}, "what the runs measure"),
    (WIDTH, {"panels": (Panel("per_uint"),)}, r"Fix: Panel\('per_unit'\)"),
    (TINY, {"panels": (Panel("accuracy", slope=-1),)}, "positive numbers along x"),
    (TINY, {"x": "method.trigger", "only": (("method.trigger", 0),), "panels": (Panel("accuracy", slope=1),)},
     "positive numbers along x"),
    (WIDTH, {"x": "method", "panels": (Panel("per_unit", slope=-1),)}, "positive numbers along x"),
    (TINY, {"x": "draws"}, "among what the grids vary"),
    (TINY, {"series": ("draws",)}, "among what the grids vary"),
    (TINY, {"only": (("draws", 3),)}, "among what the grids vary"),
    (TINY, {"only": (("method.trigger", 7),)}, "a selection that a run"),
    (SWEPT, {"only": (("draws", 3),)}, "a selection that a run"),
    (TINY, {"grids": ({"method.name": ()},), "series": ()}, "values for method.name"),
    (TINY, {"grids": (TINY.grids[0], {"method.trigger": ()})}, "values for method.trigger"),
    (TINY, {"grids": ({"method.name": "baseline"},), "series": ()}, "values for method.name"),
    (TINY, {"grids": ({"evaluation.sweep": ((), (1, 2))},), "x": "evaluation.sweep", "series": ()}, "in all runs or"),
])
def test_figures_that_could_not_be_drawn_are_refused(study, change, reason):
    with pytest.raises(Refusal, match=reason):
        replace(study, **change)


@pytest.mark.parametrize("options, reason", [
    ({"show": "median"}, "one of mean, spread"), ({"slope": "steep"}, "of its type as slope"),
    ({"metric": ("accuracy",)}, "of its type as metric"),
])
def test_panels_that_cannot_be_meant_are_refused(options, reason):
    with pytest.raises(Refusal, match=reason):
        Panel(**{"metric": "accuracy"} | options)


def test_figures_that_can_be_drawn_are_not_refused():
    assert replace(SWEPT, only=(("draws", 2),), panels=(Panel("defect_plugin", "spread", slope=-0.5),)).points()
    paths = BASE.changed({"evaluation.paths": True, "setup.group": "none"})
    assert replace(TINY, base=paths, panels=(Panel("conv1/f_fc/share"), Panel("log_evidence"))).points()
    assert replace(TINY, x="method.trigger", panels=(Panel("changed"), Panel("elbo", slope=1))).points()
    assert replace(TINY, base=BASE.changed({"setup.group": "none"})).points()  # by default a panel may stay empty
    assert replace(WIDTH, base=FunctionRun("of somebody else"), panels=(Panel("anything"),)).points()


def test_a_comparison_needs_something_to_compare_with():
    with pytest.raises(Refusal, match="group with more than one element"):
        replace(COMPARED, setup=replace(SETUP, group="none")).study()
