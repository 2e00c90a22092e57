"""Which architecture to keep within a budget: by scores from images, or as the gates of a search say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from spvit.architecture import DEFAULT_MULTIPLE, Architecture
from spvit.budget import Budget, check_multiple
from spvit.errors import CalibrationError, ConstraintError, NotSearchableError
from spvit.hosts.host import Host
from spvit.hosts.walk import Report
from spvit.repair.choose import check_reachable, decide_by_scores
from spvit.repair.constraints import Constraints
from spvit.repair.objective import Asked
from spvit.repair.scores import Scores, score
from spvit.search.network import searchable_inside
from spvit.search.read_off import decide_by_gates
from spvit.speed.latency import LatencyTable, decide_by_latency, measure


def decide(
    net: nn.Module | Host,
    *,
    macs: str | int | None = None,
    params: str | int | None = None,
    latency: str | None = None,
    table: LatencyTable | None = None,
    multiple: int | None = None,
    scores: Scores | None = None,
    calibration: Tensor | Iterable[Any] | None = None,
    constraints: Constraints | None = None,
    objective: Asked = "auto",
    report: Report | None = None,
) -> Architecture:
    """Return the architecture with the best scores within a budget, or the one that the gates of a search choose.

    By scores: every candidate of every site was measured by how little the outputs diverge from the dense ones after
    its repair, and the choice with the least sum of scores within the budget is taken, narrow attention included. Prune
    to it with `repair=` the same images. With a budget of MACs, where nothing but prefix tokens (the class token)
    is read behind the last block, that block runs for them alone, which changes no output; not so with
    `Constraints(keep_patches=True)`.

    By gates, without a budget, it is exactly what the network computes in evaluation mode. With one, attention stays as
    the gates say and the threshold on the FFN gates is shifted until the cost is within 0.5 % of the budget.

    Args:
        net: a dense host, with scores or calibration images; or what `make_searchable` returned, searched.
        macs: budget: `"50%"` of the host's cost, `"1.0G"` or a whole number.
        params: the same in parameters; give at most one of the three.
        latency: `"60%"` of the host's latency, or `"8ms"` (s, ms, us, ns), of one pass; met within 3 %, measured.
        table: with a latency budget, what `measure(host, batch=...)` returned; None measures now, at batch 1. Whole
            networks that are measured on the way are added to it, so that the same decision needs no measurement.
        multiple: FFN widths, and ranks of attention, are multiples of it. Default: with a budget 8, or the largest of
            4, 2, 1 that lands within 0.5 % where 8 is too coarse (very small hosts); by gates without a budget 1.
        scores: what `score(host, images)` returned.
        calibration: images to score the host with now, as in `score`: the short form for a single budget.
        constraints: what the scores' choice leaves alone, such as `Constraints(keep=(0, -1), forbid="skip")`.
        objective: with calibration images, what counts of the outputs, as in `score`; scores must be by the same.
        report: with calibration images, called as by `score`; where latency is measured, as by `measure`.

    Raises:
        BudgetError: the budget is malformed, or cannot be reached; names the smallest or largest cost that can.
        CalibrationError: the scores are of another model or objective, the images cannot be used, or both are given;
            or the table is of another model, device or setting.
        ConstraintError: constraints name what the host does not have, or are given for the gates of a search.
        UnsupportedHostError: the model's family, or a part of it, is not known.
        NotSearchableError: the network has no gates and there are neither scores nor images.
    """
    check_multiple(multiple)
    if scores is None and calibration is None:
        budget = None if macs is None and params is None and latency is None else Budget.parse(macs, params, latency)
        if isinstance(net, Host) or searchable_inside(net) is None:
            raise NotSearchableError(
                f"this {type(net).__name__} is not searchable; give scores=spvit.score(host, images), "
                "or pass what spvit.make_searchable(host) returned"
            )
        if constraints is not None and constraints.given():
            found = "; ".join(constraints.given().values())
            raise ConstraintError(
                f"{found}: constraints bind decisions by scores, but here the gates of a search decide; leave them "
                "out, or decide for the dense host with scores=spvit.score(host, images)"
            )
        return decide_by_gates(net, budget, multiple)
    budget = Budget.parse(macs, params, latency)
    host, constraints = Host.of(net), constraints or Constraints()
    table = None if latency is None else table or measure(host, report=report)
    if table is not None:
        table.check(host)
    priced = None if table is None else table.cost
    if scores is None:
        check_reachable(host, budget, multiple, constraints, None, objective, priced)  # before scoring
        assert calibration is not None
        scores = score(host, calibration, multiple=multiple or DEFAULT_MULTIPLE, objective=objective, report=report)
    elif calibration is not None:
        raise CalibrationError("decide takes scores or calibration images, found both; leave one of the two out")
    scores.check_objective(objective)
    if table is not None:
        return decide_by_latency(host, scores, budget, table, multiple, constraints)
    return decide_by_scores(host, scores, budget, multiple, constraints)
