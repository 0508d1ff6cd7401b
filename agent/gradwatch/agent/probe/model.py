"""A watched model: what is known of one model whose gradients are looked at, whoever reduces them."""

from __future__ import annotations

import math
import time
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe import replica
from gradwatch.agent.probe.autopsy.kept_values import version as version_of
from gradwatch.agent.probe.device_look import DeviceLook
from gradwatch.agent.probe.inspection.taken import Taken
from gradwatch.agent.probe.inspection.weights import BadWeight, WeightsState, bad_in
from gradwatch.agent.probe.look import HostLook
from gradwatch.agent.probe.parameters import Names, class_name, local, name_parameters
from gradwatch.agent.probe.passes import Pass, Passes
from gradwatch.agent.probe.rank import world_size
from gradwatch.agent.probe.recorder import Recorder
from gradwatch.agent.probe.replica import ReplicaCheck
from gradwatch.agent.probe.rounds import BucketFindings, ReducedFindings, bad_gradients
from gradwatch.agent.probe.steps import Attempts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

    from gradwatch.agent.probe.fsdp_shards import Shards
    from gradwatch.agent.probe.look import Look
    from gradwatch.agent.probe.parameters import ParameterInfo
    from gradwatch.agent.probe.passes import Fact
    from gradwatch.agent.probe.rounds import BadGradient, Bucket, Moment
    from gradwatch.agent.probe.watcher import Watcher

# Values per round: of each parameter before a backward pass or a reduction and after it; and of each bucket,
# of which there are fewer, where the reduced ones cannot be told apart.
_VALUES_PER_PARAMETER = 3
# And five for each micro-batch.
_VALUES_OF_PASSES = 64

_ON_A_DEVICE = (
    "a device's weights may have been updated by the time the fault is read out; with the policy's guard, or "
    "its read_out: every_step, they are as they were"
)


class WatchedModel:
    """One model under watch. Nothing of it is reachable from the user's objects.

    Args:
        watcher: the process's.
        module: the user's model, inside any wrapper; None where `_names` knows without it.
        parameters: whose gradients are looked at, in an order that is the same on every rank.
        device: where these are.
        root: ordinal of this model in its process.
        wrapper: as in the `Model` message.
        group_size: ranks that reduce together.
        group: global ranks of these; empty when they are the whole world, or not known.

    Attributes:
        group_size: ranks that reduce together.
        group: as given.
        device: where its gradients are.
        source: which look finds bad gradients, as in the `NonFinite` message.
        reduces: whether what `look_after` sees is the work of a reduction.
        replayed: whether a pass of it may be replayed.
        replicates: whether each rank of the group holds the same parameters.
        last_round: the newest round that was reduced.
        last_step: the step of that round.
        bad_round: the first round since the last update whose reduced gradients are bad, as far as
            the host knows. It stays until the next round: one model may have several optimizers.
        bad_step: the step of that round.
        attempted: an update was attempted since that newest round.
        reduced_magnitude: the largest of the newest round, NaN if there is one; 0 on a device, and for one
            whose square does not overflow.
        reduced_excused: of the reduced gradients, while non-finite: whether a GradScaler's overflow was
            said to have made them so; None when nothing was said.
        recorder: of its last rounds.
        flight_told: of the bad rounds under way, how it came to them.
        differs_by_rank: whether each rank sees another part of the reduced gradients.
        fused_updates: by optimizers that no parameter's version tells of.
        shards: of the parameters; None where each rank holds them whole.
        attempts: of its updates.
        weights: what is known of them.
        taken: its gradients, as they have been looked at after their reduction.
        taken_bad: they were changed since, and are bad, as an optimizer takes them.
        unreduced: keys of those that a backward pass has changed since, without a reduction.
        eager: updates take such gradients, so they are looked at at the end of each such backward pass.
    """

    source = "gradient"
    reduces = True
    replayed = True
    replicates = False
    differs_by_rank = False
    shards: Shards | None = None

    def __init__(
        self,
        watcher: Watcher,
        module: torch.nn.Module | None,
        parameters: Sequence[torch.Tensor],
        *,
        device: torch.device,
        root: int,
        wrapper: str,
        group_size: int,
        group: Sequence[int] = (),
    ) -> None:
        self.root = root
        self.fuses = watcher.fuses
        self.attempts = Attempts()
        self.weights = WeightsState()
        self.taken = Taken()
        self.taken_bad = False
        self.unreduced: set[int] = set()
        self.eager = False
        self._round_order: list[int] = []
        self._unreduced_told: set[int] = set()
        self._hold: Moment | None = None
        self._moved = False
        self.last_round = self.last_step = 0
        self.fused_updates = 0
        self.bad_round: int | None = None
        self.bad_step = 0
        self.attempted = False
        self.reduced_magnitude = 0.0
        self.reduced_excused: bool | None = None
        self.flight_told = False
        self._watcher = watcher
        self._wrapper = wrapper
        names = self._names(module, parameters)
        self._module_class = names.module_class
        self.group_size, self.group = group_size, tuple(group)
        self._moment: Moment | None = None
        self._handles: list[RemovableHandle] = []
        self._infos: dict[int, ParameterInfo] = {}
        self._keys: dict[int, int] = {}
        self.parameter_ids = frozenset(id(parameter) for parameter in parameters)
        self._parameters = [weakref.ref(parameter) for parameter in parameters]
        for parameter, info in names.parameters:
            key = self._key_of(parameter)
            self._infos[key] = info
            self._keys[id(parameter)] = key
        self._module = None if module is None else weakref.ref(module)
        self.recorder = Recorder(root, self._infos)
        self.device = device
        self._on_cuda = device.type == "cuda"
        self._new_event: Callable[[], Any] | None = None
        self.look = self._choose_look(device, len(self._infos))
        self._passes = Passes(
            self.look.fact,
            lambda: watcher.arrivals.ordinal,
            self.fuses,
            watcher.spent,
            self._gradients_so_far,
            capsules=watcher.autopsies.capsules_for(self),
            weights=self._weights_now,
            device=device,
            loss=lambda: watcher.losses.current,
        )
        self._pass: Pass | None = None
        self._replicas = ReplicaCheck(watcher.settings.replica_check_every, self._new_event)
        self._weights_before = self._weights_now()
        self._weights_at_round: tuple[int, ...] | None = None

    def number(self, root: int) -> None:
        """Its ordinal among the models of the process, as long as it has not been told of."""
        self.root = self.recorder.root = root

    def forget_state(self) -> None:
        """Keep nothing of the module's Python state until its next pass: it may be over."""
        self._passes.forget_state()

    def let_go(self) -> None:
        """The user's objects are gone: keep none of them. The garbage collector may be what calls it."""
        self._passes.let_go()
        self.weights.bad = []

    def follow_arrivals(self) -> None:
        """Have every parameter tell when its gradient arrives."""
        for parameter in self.parameters():
            self._handles += [on_arrival(parameter, hook) for hook in self._arrival_hooks(parameter)]

    def leave_arrivals(self) -> None:
        """Take the hooks off: the parameters may be wrapped again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _arrival_hooks(self, parameter: torch.Tensor) -> list[Callable[[torch.Tensor], None]]:
        return [self._watcher.arrivals.hook(self._keys[id(parameter)])]

    def _names(self, module: torch.nn.Module | None, parameters: Sequence[torch.Tensor]) -> Names:
        if module is None:
            raise ValueError("a model without a module has names of its own")
        return Names(class_name(module), name_parameters(module, parameters))

    def _key_of(self, _parameter: torch.Tensor) -> int:
        """In the order of arrival."""
        return self._watcher.arrivals.new_key()

    # ------------------------------------------------------------------ the passes

    def entered(self, args: Any, kwargs: Any) -> None:
        """A forward pass through the module begins with these arguments."""
        trains = torch.is_grad_enabled()
        chained = self._watcher.has_several
        # What is made without gradients can be handed to another model.
        if self._capturing() or not (trains or chained):
            self._pass = None
            return
        if trains:
            self._watcher.thread.leads()
        began = time.perf_counter()
        outputs = self._watcher.outputs if chained else None
        own = self._parameters_until_updated() if chained else None
        self._pass = self._passes.entered(args, kwargs, self._watcher.batch, outputs, own, remember=trains)
        self._watcher.spent(time.perf_counter() - began)

    def left(self, output: Any) -> None:
        """It has ended with this output."""
        if self._pass is None:
            return
        began = time.perf_counter()
        self._passes.left(self._pass, output, self._watcher.outputs if self._watcher.has_several else None)
        self._pass = None
        self._watcher.spent(time.perf_counter() - began)

    def _parameters_until_updated(self) -> Callable[[], Fact]:
        """Gives whether the parameters are finite, as long as no optimizer has stepped since."""
        clock = self._watcher.clock
        now = clock.attempts
        return lambda: self.look.fact(self.parameters()) if clock.attempts == now else None

    @property
    def gave_finite_outputs(self) -> bool:
        """Whether the passes whose backward pass is to come are known to have given finite outputs."""
        return self._passes.gave_finite_outputs

    def loss_scaled(self, losses: Any) -> None:
        """A GradScaler scales losses."""
        if not self._capturing():
            self._passes.scaled(losses)

    def _gradients_so_far(self) -> list[torch.Tensor]:
        return [gradient for parameter in self.parameters() if (gradient := parameter.grad) is not None]

    def _weights_now(self) -> tuple[int, ...]:
        """Another one after each update: by one of the first parameters and one of the last, in any order."""
        ends = (self._parameters[0], self._parameters[-1]) if self._parameters else ()
        alive = (parameter for reference in ends if (parameter := reference()) is not None)
        return (self.fused_updates, *map(version_of, alive))

    def _parameter_fact(self) -> Callable[[], Fact]:
        if self._on_cuda:
            # When a hit is read out, an update may have been applied.
            fact = self.look.fact(self.parameters())
            return lambda: fact
        known: list[Fact] = []

        def asked() -> Fact:
            if not known:
                known.append(self.look.fact(self.parameters()))
            return known[0]

        return asked

    # ------------------------------------------------------------------ the reduction

    def look_before(self, bucket: Bucket, *, is_last: bool) -> None:
        """Look at gradients before their reduction, on the stream that it is ordered after.

        Args:
            bucket: some of the round's gradients.
            is_last: no more of them will come.
        """
        watcher = self._watcher
        moment = self._moment
        if moment is None:
            self._new_round()
            moment = self._moment = watcher.round_log.begin(self, self._passes.take(), self._parameter_fact())
            self._round_order = moment.order
            if self.eager:
                # More of the same round may come after its reduction, until the update.
                self._hold = replace(moment)
                watcher.round_log.tally.begin(self._hold)
            self._check_replicas(moment)
        findings = self.look.local(moment, bucket, brief=watcher.round_log.tally.brief)
        if findings is not None:
            watcher.round_log.found(self, findings)
        watcher.autopsies.looked_at(moment, bucket)
        if is_last:
            self._all_seen(moment)

    def _all_seen(self, moment: Moment) -> None:
        """No more gradients of the round will come."""
        watcher = self._watcher
        watcher.autopsies.before_reduction(self, moment)
        if isinstance(self.look, HostLook):
            watcher.round_log.remember(self, moment, moment.loss, moment.loss_scale)
        watcher.round_log.end_local(moment, seen=isinstance(self.look, HostLook))

    def _new_round(self) -> None:
        """Gradients come that no optimizer has taken yet."""
        if not self._watcher.clock.attempts:
            self._count_unseen_update()
        self.attempts.new_round()
        self._watcher.new_round(self)
        self._let_go()

    def _count_unseen_update(self) -> None:
        """An optimizer that is none of torch's says nothing when it steps: the weights show it."""
        now = self._weights_now()
        if self._weights_at_round not in (None, now):
            self.attempts.count += 1
            self._watcher.updated_unseen(self)
        self._weights_at_round = now

    def _check_replicas(self, moment: Moment) -> None:
        """Before the update, parameters are as the last one left them: the same on every rank."""
        is_due = self._replicas.is_due()
        self._watcher.weights.round_begins(self, moment, due=is_due)
        if not is_due or not self.fuses.intact(replica.PART):
            return
        try:
            comparable = self.replicates and self.group_size == world_size() > 1
            if comparable and self.why_ranks_may_disagree() is None:
                self._replicas.begin(moment.round, moment.step, self.parameters())
                self.tell_checksum()
        except Exception as error:
            self.fuses.blow(replica.PART, error)

    def tell_checksum(self, *, wait: bool = False) -> None:
        """Write down a checksum that has arrived."""
        checksum = self._replicas.arrived(wait=wait)
        if checksum is not None:
            self._watcher.append("checksum", {"root": self.root, **checksum})

    def look_after(self, moment: Moment, reduced: Sequence[torch.Tensor]) -> None:
        """Look at what the reductions of a round gave."""
        magnitude = self.look.reduced(moment, reduced)
        bad = magnitude is not None and not math.isfinite(magnitude)
        if magnitude is not None:
            self.reduced_magnitude = magnitude
            self._watcher.round_log.end_reduced(
                self, moment, bad=bad, findings=lambda: self._reduced_findings(moment)
            )
        if self.attempted:
            self.attempted, self.bad_round = False, None
        self.last_round, self.last_step = moment.round, moment.step
        if bad and self.bad_round is None:
            self.bad_round, self.bad_step = moment.round, moment.step
        if magnitude is not None and self.reduces:
            if bad:
                self.taken.forget()
            else:
                self.taken.remember(self.as_taken())
        self._watcher.autopsies.round_over(self, moment, bad=bad)

    def news(self, findings: list[BucketFindings]) -> list[BucketFindings]:
        """What is to be told of findings that have been read out."""
        return findings

    def _reduced_findings(self, moment: Moment) -> ReducedFindings:
        """On the host, before anything has been done with the gradients."""
        origin = moment.origin_on_host()
        gradients = [
            (self._keys[id(parameter)], parameter.grad)
            for parameter in self.parameters()
            if parameter.grad is not None
        ]
        return ReducedFindings(bad_gradients(gradients), origin.overflow)

    # ------------------------------------------------------------------ the update

    def as_taken(self) -> list[torch.Tensor]:
        """The gradients that an optimizer takes, whose versions tell whether they have been changed."""
        return self.gradients()

    def changed_gradients(self) -> list[tuple[int, torch.Tensor]]:
        """By key, those that have been changed since they were seen finite, as this rank holds them."""
        given = self.as_taken()
        changed = {id(given[place]) for place in self.taken.changed(given)}
        return [
            (self._keys[id(parameter)], local(gradient))
            for parameter in self.parameters()
            if (gradient := parameter.grad) is not None
            and not changed.isdisjoint((id(gradient), id(local(gradient))))
        ]

    def pass_over(self, order: list[int]) -> None:
        """Gradients have arrived in a backward pass that is over.

        Args:
            order: keys of all parameters that have got one.
        """
        if order is self._round_order or self._infos.keys().isdisjoint(order):
            return
        arrived = self._infos.keys() & order
        self.unreduced |= arrived
        if self.eager and self.on_host and self.bad_round is None:
            passes = self._passes.take()
            new = arrived - self._unreduced_told
            gradients = [
                (key, gradient)
                for parameter in self.parameters()
                if (key := self._keys[id(parameter)]) in new and (gradient := parameter.grad) is not None
            ]
            bad = bad_gradients(gradients)
            if bad:
                self.found_unreduced(bad, passes)
            for one in passes:
                one.release()

    def found_unreduced(self, bad: Sequence[BadGradient], passes: Sequence[Pass] = ()) -> None:
        """Gradients of this rank's own, which nobody reduces, are bad.

        They belong to the round that was reduced last: those of the next one come after the update.

        Args:
            bad: those that are.
            passes: that they are of, as far as they are known.
        """
        watcher, log = self._watcher, self._watcher.round_log
        bad = [one for one in bad if one.key not in self._unreduced_told]
        if not bad:
            return
        self._unreduced_told |= {one.key for one in bad}
        *others, one = passes or [Pass(batch=watcher.batch, backward=max(0, watcher.arrivals.passes - 1))]
        moment = log.begin_pass(
            self, one, self._parameter_fact(), round_=max(0, log.tally.rounds - 1), others=tuple(others)
        )
        moment.order[:] = watcher.arrivals.order
        self.source, source = "gradient", self.source
        try:
            origin = moment.origin_on_host()
            log.found(self, BucketFindings(moment, 0, list(bad), origin, moment.passes), replay=bool(passes))
        finally:
            self.source = source
            log.tally.settle(moment)
            watcher.autopsies.round_over(self, moment, bad=None)

    def give_up(self) -> None:
        """It is not watched any more: nothing is waited for that will not come."""
        moment, self._moment = self._moment, None
        if moment is not None:
            # An exception has left its backward pass.
            self._watcher.round_log.forget(moment)
            self._watcher.autopsies.forget(moment)
        self._let_go()

    def update_over(self) -> None:
        """An attempt of an update is over."""
        self._let_go()

    def _let_go(self) -> None:
        """What comes now is of another round."""
        self.unreduced.clear()
        self._unreduced_told.clear()
        hold, self._hold = self._hold, None
        if hold is not None:
            self._watcher.round_log.tally.settle(hold)

    def has_not_moved(self) -> bool:
        """Whether no update before the one that is just over has changed the weights."""
        if self._moved:
            return False
        now = self._weights_now()
        self._moved, self._weights_before = now != self._weights_before, now
        return True

    def bad_weights(self) -> list[tuple[torch.Tensor, BadWeight]] | None:
        """Those that are not finite, in the order of the model, each with its finding; None on a device."""
        if not self.on_host:
            return None
        found = [(one, finding) for one, held in self._held_weights() if (finding := bad_in(held))]
        infos = self._infos_of([parameter for parameter, _ in found])
        return [
            (parameter, BadWeight(info.name, info.numel, finding))
            for info, (parameter, finding) in zip(infos, found, strict=True)
        ]

    def _held_weights(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Its weights, with those that are not trained, and what this rank holds of each."""
        module = self.module()
        weights = self.parameters() if module is None else module.parameters()
        return [(one, local(one)) for one in weights]

    def _infos_of(self, weights: Sequence[torch.Tensor]) -> list[ParameterInfo]:
        module = self.module()
        if module is None or not weights:
            return [self.info_of(one) for one in weights]
        return [info for _, info in name_parameters(module, weights)]

    # ------------------------------------------------------------------ the guard

    def why_ranks_may_disagree(self) -> str | None:
        """Why the reduced gradients may differ between ranks; None when they do not."""
        return None

    def gradients(self) -> list[torch.Tensor]:
        """The reduced gradients that this rank has."""
        return [
            gradient
            for reference in self._parameters
            if (parameter := reference()) is not None and (gradient := parameter.grad) is not None
        ]

    @property
    def has_error_feedback(self) -> bool:
        """Whether the reduction carries something from round to round."""
        return False

    def forget_error_feedback(self) -> None:
        """Clear what the reduction carries from round to round."""

    # ------------------------------------------------------------------ afterwards

    def start_over(self) -> None:
        """A checkpoint has been loaded: what went before is over, and written down."""
        self._moment = None
        self.last_round, self.bad_round, self.attempted = 0, None, False
        self.reduced_magnitude = 0.0
        self.reduced_excused, self.flight_told = None, False
        self.weights = WeightsState()
        self.taken.forget()
        self.unreduced.clear()
        self._unreduced_told.clear()
        self._hold, self._round_order = None, []
        self.recorder.start_over()

    def catch_up(self, *, wait: bool = False) -> None:
        """Write down what is known by now of earlier rounds; with `wait`, all there is to know of them."""
        landed = self.look.arrived(wait=wait)
        if landed:
            self._watcher.round_log.landed(self, landed)
        if self._replicas.under_way:
            self.tell_checksum()

    @property
    def under_way(self) -> bool:
        """Whether something of it is to be read out still."""
        return self.look.under_way or self._replicas.under_way

    @property
    def nbytes(self) -> int:
        """Memory that is kept for it, at most."""
        return self.recorder.nbytes + self.look.nbytes

    # ------------------------------------------------------------------ about it

    @property
    def keys(self) -> Iterable[int]:
        """The keys of its parameters."""
        return self._infos

    def key_of(self, parameter: torch.Tensor) -> int:
        """The key of one of its parameters."""
        return self._keys[id(parameter)]

    def ids_of(self, keys: Iterable[int]) -> set[int]:
        """The `id`s of the parameters with these keys."""
        wanted = set(keys)
        return {one for one, key in self._keys.items() if key in wanted}

    def find_key(self, parameter: torch.Tensor) -> int | None:
        """The same; None where it is another one's."""
        return self._keys.get(id(parameter))

    def info_of(self, parameter: torch.Tensor) -> ParameterInfo:
        """One of its parameters."""
        return self._infos[self.key_of(parameter)]

    def info(self, key: int) -> ParameterInfo:
        """The parameter with this key."""
        return self._infos[key]

    def parameters(self) -> list[torch.Tensor]:
        """The reducer's parameters that are still there."""
        return [parameter for reference in self._parameters if (parameter := reference()) is not None]

    def counted(self) -> list[torch.Tensor]:
        """Those whose optimizer counts the steps, when this is the first model."""
        return self.parameters()

    def module(self) -> torch.nn.Module | None:
        """The user's model, inside any wrapper; None when it is not known or not there any more."""
        return None if self._module is None else self._module()

    @property
    def on_host(self) -> bool:
        """Whether its gradients are in host memory, and looked at at once."""
        return isinstance(self.look, HostLook)

    # ------------------------------------------------------------------ a replay

    def why_not_replayed(self) -> str | None:
        """Why no pass of it can be replayed now; None when one can be."""
        return None if self.on_host or self._watcher.settings.holds_weights else _ON_A_DEVICE

    def prepare_replay(self, shards: Mapping[int, Sequence[torch.Tensor]]) -> dict[int, torch.Tensor]:
        """In a child process: have the module compute without anything of another rank.

        Args:
            shards: by rank, what it holds of the parameters, where these are sharded.

        Returns:
            Its parameters by key.
        """
        if shards:
            raise ValueError("each rank holds the whole parameters of this model")
        return {self._keys[id(parameter)]: parameter for parameter in self.parameters()}

    def as_message(self, *, with_parameters: bool) -> dict[str, Any]:
        """The `Model` message in its JSON mapping."""
        message: dict[str, Any] = {
            "root": self.root,
            "module_class": self._module_class,
            "wrapper": self._wrapper,
            "group_size": self.group_size,
            "parameter_count": sum(info.numel for info in self._infos.values()),
        }
        if self.group:
            message["group"] = [*self.group]
        if with_parameters:
            message["parameters"] = [info.as_message() for info in self._infos.values()]
        return message

    def _choose_look(self, device: torch.device, parameters: int) -> Look:
        if not self._on_cuda:
            return HostLook()
        return self._device_look(device, parameters, torch.cuda.Event)

    def _device_look(self, device: torch.device, parameters: int, new_event: Callable[[], Any]) -> DeviceLook:
        self._new_event = new_event
        return DeviceLook(
            _VALUES_PER_PARAMETER * parameters + _VALUES_OF_PASSES,
            device,
            new_event,
            self._watcher.round_log.drop,
            with_flag=self._watcher.guarding is not None,
        )

    def _capturing(self) -> bool:
        return self._on_cuda and torch.cuda.is_current_stream_capturing()


def on_arrival(parameter: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """Have `hook` called when the parameter's gradient has been accumulated."""
    return parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call, no-any-return]


def can_be_followed(parameter: torch.Tensor) -> bool:
    """Whether a parameter can tell when its gradient arrives."""
    # One that is sharded (a DTensor) belongs to who has sharded it.
    return parameter.requires_grad and parameter.is_leaf and not hasattr(parameter, "_local_tensor")


def is_followed(parameter: torch.Tensor, handle: RemovableHandle) -> bool:
    """Whether the hook of `on_arrival` is still there."""
    hooks: dict[int, Any] | None = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return handle.id in (hooks or ())
