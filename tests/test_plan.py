"""`fused-kopt plan`: shapes against the models' own code, layouts and rings against simulations, bytes and times against hand-made sums."""

import itertools
import json
import re
from collections import Counter
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from terminal import Run

import fused_kopt
from fused_kopt import aggregate, layout
from fused_kopt.commands import division, machines, models, plan, scale
from fused_kopt.commands.common import RefusedError
from fused_kopt.commands.division import Job, Zero
from fused_kopt.commands.machines import MACHINES, Latency, Topology
from fused_kopt.commands.plan import Settings
from fused_kopt.commands.scale import Load
from fused_kopt.commands.variants import OPTIMIZERS
from fused_kopt.distributed import partition, sharded

# as the models' pages, or the publications, count them
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v2-lite": 15_706_484_224,
}
# small ones of every family, with the options that change shapes
SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
EXPERTS = {"moe_intermediate_size": 40, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": True},
    "heads": {"model_type": "mistral", **SMALL, "num_key_value_heads": 1, "head_dim": 24, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", **SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mixtral": {"model_type": "mixtral", **SMALL, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    | {"tie_word_embeddings": False},
    "deepseek": {"model_type": "deepseek_v2", **SMALL, **LATENT, **EXPERTS, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "inner": {"model_type": "gpt2", "vocab_size": 128, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_inner": 100, "n_head": 4},
}
RANKS = (1, 2, 3, 8)
COUNTS = ([1], [64], [65, 1, 1000], [0, 3, 64, 129], [10_000, 7, 333], [1] * 20)


def job(**changes: Any) -> Job:
    model = models.Model("two layers", "here", (((100, 64), (64,)), ((30, 10), (7,))), 6771)
    settings: dict[str, Any] = {"topology": Topology(2, 4), "optimizer": fused_kopt.Adam(precision="bf16_master"), **changes}
    return Job(settings.pop("model", model), **settings)


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """Writes a configuration, and returns its path."""

    def write(config: Any) -> str:
        path = tmp_path / "config.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        return str(path)

    return write


# Models.


@pytest.mark.parametrize("name", models.CATALOGUE)
def test_the_catalogue_counts_as_published(name: str) -> None:
    found = models.model(name)
    assert found.parameters == PARAMETERS[name]
    sparse = {"mixtral-8x7b": 12.9e9, "deepseek-v2-lite": 2.66e9}  # Jiang et al. 2024: 13B; DeepSeek-AI 2024: 2.4B, without the head
    assert found.active == pytest.approx(sparse.get(name, PARAMETERS[name]), rel=0.002)


@pytest.mark.parametrize("name", [*models.CATALOGUE, *CONFIGS])
def test_shapes_are_those_of_the_models_own_code(name: str, written: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[name] if name in CONFIGS else models.CATALOGUE[name][1]
    made = dict(config)
    with torch.device("meta"):
        real = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(made.pop("model_type"), **made))
    found = models.model(written(config))
    shapes = Counter(tuple(p.shape) for p in real.parameters())
    assert found.parameters == sum(p.numel() for p in real.parameters())
    if "num_experts_per_tok" not in config:  # of which transformers makes one tensor for all of a layer
        assert Counter(found.shapes) == shapes


def test_experts_that_a_token_does_not_meet_are_idle(written: Any) -> None:
    dense, mixed = ({**CONFIGS["mixtral"], "num_experts_per_tok": n} for n in (4, 1))
    assert models.model(written(dense)).active == models.model(written(dense)).parameters
    each = 3 * 64 * 96
    assert models.model(written(mixed)).parameters - models.model(written(mixed)).active == 3 * 3 * each


def test_a_number_of_parameters() -> None:
    found = models.model("7e9")
    assert (found.parameters, found.active, len(found.groups)) == (7_000_000_000, 7_000_000_000, 32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("llama-9", "must be one of gpt2, .*or a number of parameters such as 7e9. Received: llama-9"),
        ("-5", "must be 32 to 1e15. Received: -5"),
        ("nan", "must be 32 to 1e15"),
        ("missing.json", "missing.json cannot be read"),
        ("{", "cannot be read"),
        ([1], "must hold a JSON object.*list"),
        ({"model_type": "bert"}, "model_type 'bert' are not known, only those of gpt2, llama"),
        ({}, "model_type None"),
        ({k: v for k, v in CONFIGS["llama"].items() if k != "intermediate_size"}, "lacks 'intermediate_size'"),
        ({**CONFIGS["llama"], "hidden_size": -1}, "hidden_size must be an int above 0. Received: -1"),
        ({**CONFIGS["llama"], "hidden_size": 64.5}, "hidden_size must be an int above 0. Received: 64.5"),
        ({**CONFIGS["llama"], "mlp_bias": True}, "mlp_bias"),
    ],
    ids=str,
)
def test_what_is_no_model(given: Any, message: str, written: Any) -> None:
    with pytest.raises(RefusedError, match=message):
        models.model(given if isinstance(given, str) and given != "{" else written(given))


# Layouts.


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_pieces_are_the_flat_buffers(counts: list[int], ranks: int) -> None:
    size = division.share(counts, ranks)
    segments = layout.plan(torch.empty(n) for n in counts)
    assert size % layout.ALIGNMENT == 0
    assert 0 <= size * ranks - segments[-1].end < layout.ALIGNMENT * ranks
    owner = torch.full((size * ranks,), -1)  # by element: its variable
    for number, segment in enumerate(segments):
        owner[segment.offset : segment.offset + segment.numel] = number
    for rank in range(ranks):
        mine = owner[rank * size : (rank + 1) * size]
        assert division.pieces(counts, size, rank) == [n for n in ((mine == i).sum().item() for i in range(len(counts))) if n]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("least", [1, 500, 1 << 20])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_the_layout_is_that_of_sharded_optimizers(counts: list[int], least: int, ranks: int) -> None:
    for mine in division.parts(counts, 4, least):
        part = partition.Part([torch.zeros(n) for n in mine], ranks)
        assert part.share == division.share(mine, ranks)
        for rank in range(ranks):
            assert [share.end - share.start for share in part.of(rank)] == division.pieces(mine, part.share, rank)


def test_parts_are_as_long_as_by_default() -> None:
    assert (division.SHARD_BYTES, division.REDUCE_BYTES) == (sharded.PART_BYTES, aggregate.PART)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("shape", [(7, 3), (8,), (1, 5), (64, 2, 2)], ids=str)
def test_rows_are_torchs(shape: tuple[int, ...], ranks: int) -> None:
    assert division.rows([shape], ranks) == [tuple(torch.chunk(torch.empty(shape), ranks)[0].shape)]


# Memory.


@pytest.mark.parametrize("ranks", [1, 8, 64, 1024])
def test_zeros_own_sum(ranks: int) -> None:
    """Rajbhandari et al. 2020, figure 1: (2 + 2 + 12/N), (2 + 14/N) and 16/N bytes per parameter of Adam in mixed precision."""
    model = models.Model("", "", (((1 << 20,),),) * 64, 1 << 26)
    per = {"0": 16.0, "1": 4 + 12 / ranks, "2": 2 + 14 / ranks, "fsdp": 16 / ranks}
    for zero, expected in per.items():
        held = division.held(job(model=model, topology=Topology(1, ranks), zero=zero))
        assert (held.total - held.temporaries) / (1 << 26) == expected


@pytest.mark.parametrize("zero", plan.ZERO)
@pytest.mark.parametrize("policy", fused_kopt.precision.NAMED)
def test_state_is_what_the_optimizer_allocates(policy: str, zero: Zero) -> None:
    made = job(zero=zero, optimizer=fused_kopt.Adam(precision=policy))
    optimizer = fused_kopt.Adam(precision=policy)
    optimizer.build([torch.zeros(shape, dtype=torch.bfloat16) for shape in division.own(made)])
    allocated = sum(buffer.nbytes for bucket in optimizer._state.buckets.values() for buffer in bucket.flat.values())
    assert division.held(made).state == allocated


def test_bytes_held_by_hand() -> None:
    held = {zero: division.held(job(zero=zero)) for zero in plan.ZERO}
    share = ceil((6400 + 64 + 320 + 64) / (64 * 8)) * 64  # one part
    own = 13 * 64 + 8 + 4 * 10 + 1  # rows of the first rank
    state = 12 * share, 12 * (13 * 64 + 64 + 64 + 64)
    assert held["0"] == (2 * 6771, 2 * 6771, 12 * (6400 + 64 + 320 + 64), 2 * 6848)
    assert held["1"] == (2 * 8 * share, 2 * 6771, state[0], 2 * share + 2 * 8 * share)
    assert held["2"] == (2 * 8 * share, 2 * share, state[0], 2 * 8 * share + 2 * 6400)
    assert held["fsdp"] == (2 * own, 2 * own, state[1], 2 * (2 + 2) * 6464)


def test_parts_are_cut_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert division.parts([5, 5, 5, 1], 2, 20) == [[5, 5], [5, 1]]
    assert division.parts([100, 1, 100], 1, 1) == [[100], [1], [100]]
    monkeypatch.setattr(division, "SHARD_BYTES", 1000)
    made = job()
    assert division.runs(made) == [[6400], [64, 300, 7]] and scale.sent(made)[1].messages == 2  # noqa: PT018
    assert division.owned(made) == ceil(6400 / 512) * 64 + ceil((64 + 320 + 64) / 512) * 64
    assert division.own(made) == [(832,), (64,)]


def test_model_parallel_ranks_hold_a_part() -> None:
    whole, half = (division.held(job(zero="0", model_parallel=n)) for n in (1, 2))
    assert half.variables == 2 * (3200 + 32 + 150 + 4)
    assert whole.variables == 2 * 6771


# The wire.


def simulated(topology: Topology, size: int) -> tuple[float, float]:
    """Bytes over links and network that a rank sends on average in a reduce-scatter, counted hop by hop."""
    nodes, each, ring = topology
    counted = [0.0, 0.0]

    def around(members: list[int], payload: float) -> None:
        """Every member passes a part on, as often as there are others."""
        for i, rank in enumerate(members):
            beyond = rank // each != members[(i + 1) % len(members)] // each
            counted[beyond] += payload / len(members) * (len(members) - 1)

    everyone = list(range(nodes * each))
    if ring == "flat":
        for turn in range(each):  # rings that leave a node at different ranks
            turned = [node * each + (place + turn) % each for node, place in itertools.product(range(nodes), range(each))]
            around(turned, size / each)
    else:
        for node in range(nodes):
            around(everyone[node * each : (node + 1) * each], size)
        for place in range(each):
            around(everyone[place::each], size / each)
    return counted[0] / len(everyone), counted[1] / len(everyone)


@pytest.mark.parametrize("ring", plan.RINGS)
@pytest.mark.parametrize("shape", [(1, 2), (1, 8), (2, 1), (2, 4), (5, 3), (16, 1)], ids=str)
def test_bytes_are_those_of_the_rings(shape: tuple[int, int], ring: machines.Ring) -> None:
    made = job(zero="1", topology=Topology(*shape, ring))
    claims, reduced, gathered = scale.sent(made)
    assert (claims.payload, claims.messages) == (32 * made.topology.ranks, 1)
    assert reduced.payload == gathered.payload == 2 * division.whole(made)
    expected = simulated(made.topology, reduced.payload)
    assert (reduced.link, reduced.network) == pytest.approx(expected)
    _, both = scale.sent(job(zero="0", topology=made.topology))
    assert (both.link + both.network) / both.payload == pytest.approx((reduced.link + reduced.network) / reduced.payload * 2)
    assert sum(both.steps) == 2 * sum(reduced.steps)


def test_one_rank_sends_nothing() -> None:
    assert scale.sent(job(topology=Topology(1, 1))) == []


# Time.


@pytest.fixture
def two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(division, "SHARD_BYTES", 1000)


SLOW = MACHINES["h100"]._replace(peak=1.0, bandwidth=2.0, link=10.0, network=1.0, latency=Latency(1e-6, 1e-7, 1e-8))


@pytest.mark.usefixtures("two_parts")
def test_times_by_hand() -> None:
    made = job(topology=Topology(2, 4))
    found = scale.times(made, SLOW, Load(tokens=1000, mfu=0.5))
    unit = 6771 * 1000 / 0.5e12
    assert (found.forward, found.backward) == pytest.approx((2 * unit, 4 * unit))
    assert found.update == division.update(made).moved / 2e9
    assert found.copies == 2 * 2 * 6771 / 2e9
    payload = 2 * division.whole(made)
    floors = (payload * 0.75 / 10e9, payload * 0.5 / 4 / 1e9, 2 * (1e-6 + 3e-7 + 1e-8))
    claims, *others = found.collectives
    assert all(tuple(floor) == pytest.approx(floors) for floor in others)
    assert claims.total == pytest.approx(max(32 * 8 * 0.75 / 10e9, 32 * 8 * 0.5 / 4 / 1e9) + floors[2] / 2)
    whole = max(floors[:2]) + floors[2]
    assert found.exposed == pytest.approx(claims.total + whole + max(whole - found.update / 2, whole / 2))
    assert found.least_exposed == pytest.approx(claims.total + whole)  # half of each, behind passes that are long enough
    assert found.step == pytest.approx(6 * unit + found.copies + found.update + found.exposed)


@pytest.mark.usefixtures("two_parts")
@pytest.mark.parametrize(("zero", "now"), [("0", "nothing"), ("1", "nothing update"), ("2", "backward update")])
def test_what_a_pass_is_too_short_for_is_exposed(zero: Zero, now: str) -> None:
    found = scale.times(job(zero=zero), SLOW._replace(network=1e-3), Load(1000, 0.5))
    lengths = {"nothing": 0.0, "update": found.update, "backward": found.backward}
    hidden = [lengths[name] / 2 for name in now.split()]
    assert found.exposed == pytest.approx(sum(floor.total for floor in found.collectives) - sum(hidden))
    claims, *others = found.collectives
    messages = scale.sent(job(zero=zero))[1].messages
    could = [found.backward, found.forward][: len(hidden)]
    best = claims.total + sum(floor.total - length * (messages - 1) / messages for floor, length in zip(others, could, strict=True))
    assert found.least_exposed == pytest.approx(best)


@pytest.mark.parametrize(
    ("given", "expected"),
    [((8, 8, 1), (1, 8)), ((4, 8, 1), (1, 4)), ((64, 8, 1), (8, 8)), ((64, 8, 8), (8, 1)), ((64, 8, 2), (8, 4)), ((64, 8, 16), (4, 1))],
)
def test_topologies(given: tuple[int, int, int], expected: tuple[int, int]) -> None:
    assert machines.topology(*given)[:2] == expected


# The command.


def test_the_command(run: Run) -> None:
    result = run("plan", "--model", "llama-3-70b", "--gpus", 1024, "--model-parallel", 8, "--precision", "bf16_split")
    assert result.code == 0
    assert "70,553,706,496 parameters in 723 variables" in result.out
    cells = {row[0]: row[1] for row in result.rows}
    assert (cells["variables"], cells["gradients"], cells["slots and masters"]) == ("17.6 GB", "17.6 GB", "689.0 MB")
    assert "1/128 of 8,819,213,312 x (4 m + 4 v + 2 remainder)" in result.out
    assert {"reduce-scatter of gradients", "all-gather of variables", "update", "step", "step at best"} <= set(cells)


@pytest.mark.parametrize("zero", plan.ZERO)
def test_json_says_the_same(zero: Zero, run: Run) -> None:
    options = ("--model", "gpt2", "--gpus", 16, "--zero", zero, "--optimizer", "lion", "--tokens", 100, "--network", 12.5)
    result = run("plan", *options, "--json")
    assert result.code == 0
    found = json.loads(result.out)
    expected = plan.work_out(Settings("gpt2", gpus=16, zero=zero, optimizer="lion", tokens=100, network=12.5))
    assert found["memory"]["total"] == expected.held.total
    assert [one["network"] for one in found["sent"]] == [one.network for one in expected.sent]
    assert found["seconds"]["step"] == expected.times.step
    assert found["machine"]["network"] == 12.5


def test_too_little_memory_is_exit_code_1(run: Run) -> None:
    result = run("plan", "--model", "llama-3-70b", "--gpus", 1024)
    assert result.code == 1
    assert "does not fit" in result.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpus", 12), "--gpus must be a multiple of --gpus-per-node (8), or fewer. Received: 12."),
        (("--gpus", 24, "--model-parallel", 3), "--model-parallel must divide --gpus (24), and divide --gpus-per-node (8)"),
        (("--variables", "float32"), "needs a bfloat16 variable"),
        (("--gpus", 0), "must be at least 1"),
        (("--mfu", 1.5), "must be in (0, 1]. Received: 1.5."),
        (("--zero", 4), "invalid choice"),
        (("--gpu", "tpu"), "invalid choice"),
        (("--precision", "int4"), "invalid choice"),
        (("--link", "nan"), "must be a finite number above 0"),
    ],
)
def test_wrong_requests(options: tuple[Any, ...], message: str, run: Run) -> None:
    result = run("plan", "--model", "gpt2", *options)
    assert result.code == 2
    assert message in result.err


def test_every_optimizer_and_machine_has_a_plan() -> None:
    for name in OPTIMIZERS:
        assert plan.work_out(Settings("gpt2", optimizer=name)).held.total > 2 * 2 * PARAMETERS["gpt2"]
    for name in MACHINES:
        found = plan.work_out(Settings("gpt2", gpu=name, gpus=16)).times
        assert found.step > found.forward + found.backward


def test_the_page_shows_what_is_printed(run: Run) -> None:
    page = (Path(__file__).parent.parent / "docs/plan.md").read_text(encoding="utf-8")
    ((command, printed),) = re.findall(r"```bash\nfused-kopt (plan .*)\n```.*?```text\n(.*?)```", page, re.DOTALL)
    assert [line.rstrip() for line in run(*command.split()).out.splitlines()] == printed.splitlines()


def test_the_page_shows_the_machines() -> None:
    page = (Path(__file__).parent.parent / "docs/plan.md").read_text(encoding="utf-8")
    for name, m in MACHINES.items():
        memory = f"{m.memory:,.0f} GB | {m.peak:,.0f} TFLOP/s | {m.bandwidth:,.0f} GB/s"
        assert f"| {name} | {memory} | {m.link:,.0f} GB/s | {m.network:,.0f} GB/s |" in page
