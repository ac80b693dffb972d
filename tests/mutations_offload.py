"""Wrong versions of offloaded optimizers, one edit each (see `mutations.py`): what would be lost in silence."""

from mutations import group

OFFLOAD = (
    *group(
        "test_offload.py",
        "fused_kopt/distributed/transfers.py",
        ("copies overtake the caller's work", "begin", "(self._down, self._up)", "()"),
        ("the device does not wait for its variables", "up", "cuda.current_stream(self._device).wait_stream(self._up)", "pass"),
        ("a gradient in a variable is overwritten first", "keep_apart", "self._up.wait_stream(self._down)", "pass"),
    ),
    *group(
        "test_offload.py",
        "fused_kopt/distributed/loads.py",
        ("nobody waits for gradients", "wait", "self.arriving.synchronize()", "pass"),
        ("variables do not go up", "give_back", "self.link.up(self._targets, self._sources)", "pass"),
        ("what the caller wrote stays up", "start", "            if stale:", "            if False:"),
        ("padding of others is written", "_follows", "beside and same and", "same and"),
        ("gradients taken for neighbours", "_side_by_side", "np.array_equal(addresses - addresses[0], self._offsets) and", "True and"),
        ("a variable that moved is written where it was", "meets", " or list(map(_data_ptr, variables)) != self._addresses", ""),
    ),
    *group(
        "test_offload.py",
        "fused_kopt/distributed/hosting.py",
        ("versions not looked at", "enter", "if home.variable._version != home.version", "if home.version is None"),
        ("moved variables not fetched", "_look", "home.variable.data_ptr(), None, []", "home.variable.data_ptr(), home.version, []"),
        ("norms of gradients under way", "_read_at_once", "owner._clipping().by_norm or ", ""),
        ("a loss scale's check of gradients under way", "_read_at_once", "or checked ", ""),
        ("transformers of gradients under way", "_read_at_once", "or owner._transformers ", ""),
        ("verification of gradients under way", "_read_at_once", " or owner._verifying()", ""),
        ("averages start before their variables are there", "enter", "or (stale and owner.ema_momentum is not None)", ""),
        ("twins ahead of their variables are trusted", "enter", "if not self._finished:", "if False:"),
        ("settings of variables end at the first step", "_planned", "self._homes.follow(owner)", "pass"),
        ("launches begin before their gradients are there", "before", "self._wait([] if load is None else [load])", "pass"),
    ),
    *group(
        "test_offload.py",
        "fused_kopt/distributed/homes.py",
        (
            "random bits by part",
            "_add",
            "state.parts[id(twin)] = (twin, part, number)",
            "state.parts[id(twin)] = (twin, part, segment.offset)",
        ),
        ("twins are written while they are read", "pieces", "link.finish()", "pass"),
        ("averages do not go up", "publish", "for twin in twins if twin.numel()", "for twin in ()"),
        ("averages overtake the caller's work", "publish", "home.buffer.link.begin()", "pass"),
        ("averages start from nothing", "fetch", "if h.version != h.variable._version and h.twin.numel()", "if False"),
        ("settings stay behind", "_add", "stages.tell(owner, variable, twin)", "pass"),
        ("later rates stay behind", "follow", "stages.tell(owner, home.variable, home.twin)", "pass"),
        ("a part for all", "settle", "self._parts += chosen is None", "pass"),
    ),
    *group(
        "test_offload.py -k sums",
        "fused_kopt/engine.py",
        ("ranks do not sum", "_at_work", "[self._reduction, *self._stages]", "self._stages"),
    ),
    *group(
        "test_offload.py -k sums",
        "fused_kopt/distributed/shards.py",
        ("writes into shards are not passed on", "enter", "self._pass_on()", "pass"),
        ("gathered shards are fetched", "_wait", "self.parts[number].written()", "pass"),
        ("pieces count others' writes", "_settle", "part.flat.data[at", "part.flat[at"),
    ),
    *group(
        "test_offload.py -k sums",
        "fused_kopt/distributed/partition.py",
        ("shards that moved are not passed on", "bring_back", "torch.autograd.graph.increment_version([variable])", "pass"),
    ),
)
