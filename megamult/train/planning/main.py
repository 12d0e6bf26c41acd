"""Plan of a run: the sharding that the keys name beside the best of all that fit, printed as a table."""

from __future__ import annotations

from collections.abc import Sequence

from megamult.models.architectures import architecture_of
from megamult.parameters.spec import ParameterSpec
from megamult.runtime import exit_codes
from megamult.train.planning import table
from megamult.train.planning.cluster import Cluster
from megamult.train.planning.command_line import asked_for


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan that the command line asks for, and return the exit code, which says whether a sharding fits.

    Raises:
        ValueError: the command line has mistakes; the message has all of them.
    """
    config, vocab_size, cluster, source, searches = asked_for(arguments)
    # Megatron and DeepSpeed take seconds to import, and mistakes need neither.
    from megamult.distributed import environment
    from megamult.train.planning.estimate import estimate, sharded
    from megamult.train.planning.search import search
    from megamult.train.planning.specs import model_specs

    environment.set_defaults()
    specs = model_specs(config, vocab_size)
    made = estimate(config, vocab_size, specs, sharded(config, specs, cluster.ranks, cluster.cuda), cluster)
    columns, said = [("this run", made)], []
    if made.memory.peak > cluster.usable:
        said.append(table.missing("does not fit: this run", made, cluster))
    if searches:
        found = search(config, vocab_size, specs, cluster)
        if found.best is not None:
            columns.append(("best that fits", found.best))
            said.append(f"best of {found.fitting} that fit, of {found.tried}: {table.sharding(found.best)}")
        elif found.smallest is not None:
            columns.append(("smallest", found.smallest))
            smallest = f"nothing fits: the smallest of {found.tried} shardings"
            said.append(
                f"{table.missing(smallest, found.smallest, cluster)} "
                f"({table.sharding(found.smallest)}); take more GPUs, more memory, a shorter model.seq_length or a "
                "smaller model"
            )
    print(_heading(architecture_of(config.model).name, specs, cluster))
    print("\n".join(table.lines_of(columns, cluster)))
    print("\n".join([*said, *(f"assumed for {line}" for line in table.assumptions(cluster, source))]))
    fits = any(each.memory.peak <= cluster.usable for _, each in columns)
    return 0 if fits else exit_codes.DOES_NOT_FIT


def _heading(name: str, specs: dict[str, ParameterSpec], cluster: Cluster) -> str:
    count = sum(spec.numel_logical for spec in specs.values())
    return (
        f"{name}, {count:,} parameters, on {cluster.nodes} x {cluster.gpus_per_node} ranks of {cluster.memory:g} GB "
        f"and {cluster.peak:g} TFLOP/s"
    )
