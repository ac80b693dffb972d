"""Wrong versions of what repeats, flattens, replays and clips steps, one edit each (see `mutations.py`)."""

from mutations import group

REPEATED = "test_repeat.py test_flat_moves.py test_flat.py test_reliability_b.py test_reliability_c.py"

BORROWED = (
    *group(
        "test_borrowed.py",
        "fused_kopt/borrowed.py",
        ("rows of other variables", "_numbers", "given.which[members]", "given.which[: len(members)]"),
        ("everybody's row from the first", "_numbers", "if len(distinct) == 1:", "if True:"),
        ("launches bound to shared scalars", "prepare", "                repeat.bind()\n", "                pass\n"),
        ("slots laid out otherwise not written back", "_launch", "finish.append(updates.copier(slot, column[i]))", "pass"),
        (
            "slots laid out otherwise taken as they are",
            "_launch",
            "not layout.same_layout(slot.shape, stride, slot.stride())",
            "False",
        ),
        (
            "repeats of another rule",
            "prepare",
            " or not repeat.applies((task.around(u.bucket.dtype) for u in repeat.updates), task.clips, task.sums)",
            "",
        ),
        ("slots kept alive", "_anew", "each.update.bucket.borrow({})", "pass"),
        ("slots of one dtype for all", "_buckets", "slots[0][position].dtype if whole else", "slots[0][0].dtype if whole else"),
        ("shared slots not seen", "_check_slots", "if overlap or", "if False and overlap or False and"),
        ("shapes of slots not compared", "_check_whole", "slot.shape != variable.shape or", ""),
        ("autograd is not told", "take", "torch.autograd.graph.increment_version(given.variables)", "pass"),
    ),
    *group(
        "test_torch_optim_precision.py",
        "fused_kopt/borrowed.py",
        ("noise counts who is there", "_launch", "given.positions is not None", "False"),
        ("codes laid out otherwise than their scales count", "_check_stored", "dtype == torch.uint8 and", "False and"),
        ("planes not compared", "_check_stored", "slot.dtype != dtype or", ""),
    ),
    *group(
        "test_borrowed.py",
        "fused_kopt/repeat.py",
        ("borrowed slots may move", "__init__", "(*self.variables, *slots)))", "(*self.variables, *slots[:0])))"),
    ),
    *group(
        "test_borrowed.py",
        "fused_kopt/options.py",
        ("decay after the step", "decayed", "inner(p * s.decay, g, slots, s)", "inner(p, g, slots, s)"),
        ("penalty forgotten", "penalised", "g + p * s.penalty", "g"),
        ("average of the old variable", "averaged", "p, values = inner", "_, values = inner"),
    ),
)

REPEAT = (
    *group(
        REPEATED,
        "fused_kopt/repeat.py",
        ("an alias is the variable", "meets", " or not all(map(is_, variables, self.variables))", ""),
        ("moved variables written where they were", "meets", " or list(map(_data_ptr, fixed)) != self.fixed_addresses", ""),
        ("gradients of any kind", "meets", "not self.guards.check(*gradients, *fixed) or ", ""),
        ("gradients read where they were", "meets", "(addresses == self.gradient_addresses or", "(bool(self.gradient_addresses) or"),
        ("repeated step overwrites its gradients", "_move", " or self.written.touches_any(starts, starts + self.sizes)", ""),
        ("gradients at address 0", "_move", "((starts == 0) & (self.sizes > 0)).any() or ", ""),
        ("segment table written in place", "_move", "table.copy()", "table\n                table.flags.writeable = True"),
        ("slots that moved written where they were", "stays", "update.bucket.tables is tables", "True"),
        ("rule of an earlier step", "applies", "u.rule is rule and ", ""),
        ("clipped as an earlier step", "applies", " and (u.factors is None) == clips.neutral", ""),
        ("factors in the order of the pairs", "_take", "order[p] for p in positions]", "p for p in positions]"),
        ("factors never reordered", "_take", "np.array_equal(take, np.arange(len(order)))", "len(take) == len(order)"),
        ("factors of every compute dtype", "_take", "if (group.device, group.compute) == (bucket.device, bucket.compute)", ""),
        ("norms of the gradients as they lie", "_squares", "[group.positions]", "[: len(group.positions)]"),
    ),
    *group(
        REPEATED,
        "fused_kopt/repeat.py",
        (
            "buffers in another order than the slots",
            "_together",
            "segments == bucket.segments and all(",
            "len(segments) == len(bucket.segments) and any(",
        ),
    ),
    *group(
        REPEATED + " test_host_path.py",
        "fused_kopt/repeats.py",
        ("executor of an earlier step", "match", "repeat.executor == executor and ", ""),
        ("copies repeated", "learn", "any(launch.finish for launch in launches)", "False"),
        ("copied gradients repeated", "learn", " or g.data_ptr() not in borrowed", ""),
        ("repeats without an end", "learn", "others[: KEPT - 1]", "others"),
        ("another Flat's launches", "of", "self._flat.flat is not flat or ", ""),
        ("a Flat that is not whole", "of", " or not flat.whole()", ""),
        ("a Flat's slots may move", "of", " and self._flat.each.stays()", ""),
        ("others' gradients in a Flat's step", "of", " and self._flat.each.gradient_addresses is self._flat.addresses", ""),
        ("one factor for a Flat", "of", "self._flat.together if together else self._flat.each", "self._flat.together"),
        ("missing gradients pass in silence", "find", "if repeat is not None:", "if False:"),
    ),
    *group(
        REPEATED + " test_aggregate.py test_apply.py test_verification.py test_reliability_d.py",
        "fused_kopt/engine.py",
        ("transformers once", "_known", "self._transformers or ", ""),
        ("verified once", "_known", "self._verifying() or ", ""),
        ("aggregated once", "_known", " or reduced", ""),
        ("torn repeats forgotten", "_again", "self._torn = True", "pass"),
        ("factors of an earlier step", "_again", "repeat.clip(self._clipping(), self._guard)", "pass"),
    ),
    *group(
        REPEATED,
        "fused_kopt/gradients.py",
        ("a zip is read twice", "flattened", "return zip(flat[::2], flat[1::2], strict=True), flat", "return pairs, flat"),
    ),
    *group("test_flat.py", "fused_kopt/aggregate.py", ("collectives of what is there", "enter", "flat.gather()", "pass")),
)

FLAT = group(
    "test_flat_moves.py test_flat.py",
    "fused_kopt/flat.py",
    ("moved variables are whole", "whole", "list(map(_data_ptr, self.variables)) != addresses", "False"),
    ("replaced gradients are whole", "whole", "list(map(_data_ptr, map(_grad, self.variables))) == gradient_addresses", "True"),
    ("gathered without its values", "gather", "view.copy_(variable.grad)", "pass"),
    ("None gathered as it was", "gather", "view.zero_()", "pass"),
    ("restored gradients keep the buffer", "restore", "variable.grad = layout.clone(variable.grad, variable.grad.stride())", "pass"),
    ("restored over what moved", "restore", "if variable.data_ptr() == address:", "if True:"),
    ("shared variables flattened", "check_movable", "variable.is_shared() and not variable.is_cuda", "False"),
    ("views flattened", "check_movable", " or variable._is_view()", ""),
    (
        "parts of a memory flattened",
        "check_movable",
        "variable.untyped_storage().nbytes() != variable.numel() * variable.element_size()",
        "False",
    ),
    (
        "one buffer for all dtypes",
        "__init__",
        "alike.setdefault((variable.device, variable.dtype), [])",
        "alike.setdefault(variable.device, [])",
    ),
    (
        "variables flattened in row-major order",
        "_move_in",
        "place, view = segment.of(values), segment.of(grads)",
        "place, view = (segment._replace(stride=layout.contiguous_stride(segment.shape)).of(b) for b in (values, grads))",
    ),
    ("warned in every step", "_warn", "self._warned = True", "pass"),
    ("zero_grad leaves None", "zero_grad", "variable.grad = view", "pass"),
    ("zero_grad leaves sums", "zero_grad", "buffer.gradients.zero_()", "pass"),
)

REPLAYS = group(
    "test_replays.py",
    "fused_kopt/replays.py",
    ("forecasts counted", "_forecast", "weight.copy_(value)", "pass"),
    ("scalars run out", "count", "if self.left < max(steps, 1) or not steps:", "if not steps:"),
    ("new rates unread", "count", " or not steps", ""),
    ("forecast commits nothing", "_next", "self._owner._commit(steps)", "pass"),
    ("rows of segments left out", "_next", "rows or [common]", "[common]"),
)

CLIPPING = (
    *group(
        "test_norm_sums.py test_norms.py test_repeat.py test_clipping.py test_compiled.py",
        "fused_kopt/clipping.py",
        ("gradient dtypes in one group", "groups", ", gradient.dtype)", ")"),
        ("limits of the first step", "_fixed", "if clips not in self._tables:", "if not self._tables:"),
        ("shared factors written", "factors", "tables = [table.clone() for table in tables]", "tables = list(tables)"),
        ("factors of another pair", "rows", "zip(group.positions, table.unbind(), strict=True)", "enumerate(table.unbind())"),
    ),
    *group(
        "test_norm_sums.py test_norms.py",
        "fused_kopt/norms.py",
        ("norms in float32", "square_norm", "values.double().square()", "values.square().double()"),
        ("halves where neighbours are added", "_summed", "rows[:, ::2] + rows[:, 1::2]", "rows.chunk(2, 1)[0] + rows.chunk(2, 1)[1]"),
        ("block sums one after the other", "fold", "return _summed(total)[0]", "return total.sum()"),
        (
            "last block without sum",
            "__init__",
            "np.cumsum(-(-np.array(counts, dtype=np.int64) // BLOCK))",
            "np.cumsum(np.array(counts) // BLOCK)",
        ),
    ),
    *group(
        "test_norm_sums.py test_norms.py",
        "kernels/norms.py",
        ("tiles in another order", "sum_block", "(a + c) + (b + d)", "(a + b) + (c + d)"),
        ("neighbours in another order", "paired", "(LENGTH >> (level + 1), 2)", "(2, LENGTH >> (level + 1))).trans((1, 0)"),
        ("tail of a norm one short", "sum_block", "place < left", "place < left - 1"),
        ("block sums beyond the first 1,024", "fold", "range(first, last, LANES)", "range(first, first + LANES, LANES)"),
        ("squares in the compute type", "squared", "f).to(tl.float64)", "f).to(tl.float32).to(tl.float64)"),
    ),
    *group(
        "test_norm_sums.py test_norms.py",
        "kernels/cpp.py",
        (
            "C++ squares in the compute type",
            "norm_source",
            "double({value.text}) * double({value.text})",
            "double({value.text} * {value.text})",
        ),
    ),
    *group(
        "test_norm_sums.py test_norms.py",
        "kernels/cpp_text.py",
        ("C++ neighbours as halves", "", "s[i] = s[2 * i] + s[2 * i + 1]", "s[i] = s[i] + s[i + length / 2]"),
        ("sums of an earlier block", "", "for (int64_t i = count; i < length; ++i) s[i] = 0;", ""),
        ("C++ block sums beyond the first 1,024", "", "total[k % 1024] +=", "if (k < 1024) total[k % 1024] +="),
        ("squares shared by threads", "", "    double squares[@BLOCK@];", "    static double squares[@BLOCK@];"),
    ),
)

PATHS = (*BORROWED, *REPEAT, *FLAT, *REPLAYS, *CLIPPING)
