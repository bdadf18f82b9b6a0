"""``make lab``: initial replication, live deltas, recovery points, and the proof.

Told to a person as it happens; any step that does not hold ends it with the reason.
"""

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deploy.lab.proof import (
    Point,
    data_bytes,
    equals_source,
    has_whole_log,
    is_clean,
    list_points,
    opens_database,
)
from deploy.lab.rehearsal import Rehearsal, Rehearsed
from deploy.lab.stack import AgentNews, Stack, wait_for
from replication.errors import IntegrityError, ReplicationError
from vsphere_emu import block_device
from vsphere_emu.guest import Guest

INITIAL_SECONDS_MAX = 300.0
CATCH_UP_SECONDS_MAX = 120.0
POINTS_SECONDS_MAX = 120.0
RPO_SECONDS_MAX = 60.0
"""During a test failover: emulated machines boot on the same two cores as everything else."""

PROOFS_AT_ONCE = 2


@dataclass(slots=True)
class GuestStory:
    """What is measured of one guest on the way."""

    guest: Guest
    seed_bytes: int = 0
    seed_seconds: float = 0.0
    rpo_durable_seconds: float = 0.0
    rpo_restorable_seconds: float = 0.0
    under_load: list[Point] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.guest.config.name

    @property
    def flat_paths(self) -> list[str]:
        return [disk.flat_path for disk in self.guest.status().disks]


class Story:
    """One run of the lab from nothing, or from what an earlier run has left up."""

    def __init__(self, stack: Stack, console: Console, *, load_seconds: float) -> None:
        self._stack = stack
        self._console = console
        self._load_seconds = load_seconds
        self._guests: list[GuestStory] = []
        self._protected_at = 0.0

    def tell(self) -> None:
        """Run all of it; raises ReplicationError at the first thing that does not hold."""
        self._set_up()
        self._take_control()
        self._initial_replication()
        self._live()
        self._come_to_rest()
        self._prove()  # what does not hold stays as it is, to be looked into
        self._go_on()
        rehearsed = self._rehearse()
        self._console.print(self._table())
        self._console.print(_recovery_table(rehearsed))

    def _step(self, text: str) -> None:
        self._console.print(f"\n[bold]{text}[/bold]")

    def _tell_waiting(self, text: str) -> None:
        self._console.print(f"  … {text}")

    def _done(self, text: str) -> None:
        self._console.print(f"  [green]✓[/green] {text}")

    def _set_up(self) -> None:
        self._step("1  Setting up")
        began = time.monotonic()
        self._guests = [GuestStory(guest) for guest in self._stack.prepare(self._tell_waiting)]
        for story in self._guests:
            story.guest.power_on()
            story.guest.start_workload()
            disks = ", ".join(
                f"{disk.name} {disk.file_system} on {disk.device}"
                for disk in story.guest.status().disks
            )
            work = story.guest.config.workload
            self._done(f"{story.name}: {disks}; workload {work.kind if work else 'none'}")
        self._stack.start_control()
        self._done("vCenter (vcsim) over the guests; config server with a CA of its own")
        self._stack.start_second_site()
        self._done(
            "second site: cache storage account (Azurite), process server, applier, compute node"
        )
        self._stack.start_agents([story.guest for story in self._guests])
        self._done("an agent for each guest, enrolled with its own key and certificate")
        self._done(f"after {time.monotonic() - began:.0f} s")

    def _take_control(self) -> None:
        self._step("2  Discover, set a policy, protect")
        names = [story.name for story in self._guests]
        for seen in self._stack.operator.discover(names):
            self._done(f"{seen.name}: in the vCenter, {seen.power}, {seen.disks} disks")
        policy = self._stack.operator.set_policy()
        self._done(
            f"policy {policy['name']}: points are kept {policy['retention_seconds'] / 3600:.0f} h, "
            f"RPO threshold {policy['rpo_threshold_seconds'] / 60:.0f} min"
        )
        for story in self._guests:
            story.seed_bytes = sum(data_bytes(path) for path in story.flat_paths)
        self._protected_at = time.monotonic()
        self._stack.operator.protect(names)
        self._done(f"all {len(names)} are protected; their agents have begun")

    def _initial_replication(self) -> None:
        self._step("3  Initial replication, machines running")
        began = self._protected_at
        with Progress(
            TextColumn("  {task.description:10}"),
            BarColumn(bar_width=36),
            TextColumn("{task.percentage:>4.0f} %  {task.fields[told]}"),
            TimeElapsedColumn(),
            console=self._console,
        ) as progress:
            tasks = {
                story.name: progress.add_task(story.name, total=1.0, told="")
                for story in self._guests
            }
            waiting = {story.name: story for story in self._guests}
            while waiting:
                self._stack.check_alive()
                for name, story in list(waiting.items()):
                    news = self._stack.news(name)
                    if news is None:
                        continue
                    share = _share_done(news)
                    progress.update(tasks[name], completed=share, told=news.trouble or news.state)
                    if news.seeded:
                        story.seed_seconds = time.monotonic() - began
                        told = f"{_mebibytes(story.seed_bytes)} of data"
                        progress.update(tasks[name], completed=1.0, told=told)
                        del waiting[name]
                if time.monotonic() - began > INITIAL_SECONDS_MAX:
                    raise ReplicationError(
                        f"initial replication of {', '.join(waiting)} takes over "
                        f"{INITIAL_SECONDS_MAX:.0f} s",
                        hint=f"see the logs in {self._stack.layout.path('log')}",
                    )
                time.sleep(0.2)

    def _live(self) -> None:
        self._step(f"4  Live changes for {self._load_seconds:.0f} s, workloads running")
        began_ns = time.time_ns()
        began = time.monotonic()
        seen: set[tuple[str, str]] = set()
        while time.monotonic() < began + self._load_seconds or self._lacks_points(began):
            self._stack.check_alive()
            for story in self._guests:
                for point in list_points(self._stack.layout, story.name):
                    fresh = point.time_ns > began_ns and (story.name, point.name) not in seen
                    if fresh:
                        seen.add((story.name, point.name))
                        story.under_load.append(point)
                        self._tell_point(story, point)
            time.sleep(0.5)
        for story in self._guests:
            news = self._need_news(story)
            now_ns = time.time_ns()
            story.rpo_durable_seconds = (now_ns - news.durable_ns) / 1e9
            story.rpo_restorable_seconds = (now_ns - news.restorable_ns) / 1e9

    def _lacks_points(self, began: float) -> bool:
        """Whether a machine has no point under load yet: on a busy host that takes longer."""
        lacking = [story.name for story in self._guests if not story.under_load]
        if lacking and time.monotonic() > began + self._load_seconds + POINTS_SECONDS_MAX:
            raise IntegrityError(
                f"no recovery point of {', '.join(lacking)} in {POINTS_SECONDS_MAX:.0f} s of load",
                hint="`understudy machines` and the logs in "
                f"{self._stack.layout.path('log')} tell why",
            )
        return bool(lacking)

    def _tell_point(self, story: GuestStory, point: Point) -> None:
        age = (time.time_ns() - point.time_ns) / 1e9
        self._console.print(
            f"  {story.name:8} [cyan]{point.name}[/cyan] {point.consistency:5} "
            f"{_mebibytes(point.changed_bytes):>9} changed, restorable after {age:.1f} s"
        )

    def _come_to_rest(self) -> None:
        self._step("5  Workloads stop, file systems are unmounted, replication catches up")
        for story in self._guests:
            story.guest.stop_workload()
            for disk in reversed(story.guest.config.disks):
                block_device.unmount(story.guest.mount_point(disk))
        rest_ns = time.time_ns()
        for story in self._guests:
            wait_for(
                f"a recovery point of {story.name} after its disks came to rest",
                self._rested(story, rest_ns),
                CATCH_UP_SECONDS_MAX,
            )
        self._done("every machine has a recovery point of its disks at rest")

    def _rested(self, story: GuestStory, rest_ns: int) -> Callable[[], bool]:
        def holds() -> bool:
            news = self._stack.news(story.name)
            points = list_points(self._stack.layout, story.name)
            newest = max((point.time_ns for point in points), default=0)
            return news is not None and newest > rest_ns and news.todo_bytes == 0

        return holds

    def _prove(self) -> None:
        self._step("6  Proof")
        checks: list[Callable[[], str]] = []
        for story in self._guests:
            checks.append(functools.partial(self._prove_equal, story))
            for point in _spread(story.under_load):
                checks.extend(
                    functools.partial(self._prove_clean, story, point, index)
                    for index in range(len(story.guest.config.disks))
                )
            work = story.guest.config.workload
            if work is not None and work.kind == "pgbench":
                point = story.under_load[len(story.under_load) // 2]
                checks.append(functools.partial(self._prove_database, story, point))
            if work is not None and work.kind == "system":
                checks.append(functools.partial(self._prove_log, story, story.under_load[-1]))
        with ThreadPoolExecutor(PROOFS_AT_ONCE, thread_name_prefix="proof") as pool:
            for proved in pool.map(lambda check: check(), checks):
                self._done(proved)

    def _prove_equal(self, story: GuestStory) -> str:
        points = list_points(self._stack.layout, story.name)
        newest = max(points, key=lambda point: point.time_ns)
        checked = sum(
            equals_source(newest.image(index), path) for index, path in enumerate(story.flat_paths)
        )
        return f"{story.name}: newest point = source in every block ({_mebibytes(checked)})"

    def _prove_clean(self, story: GuestStory, point: Point, index: int) -> str:
        is_clean(self._stack.layout, point.image(index))
        return (
            f"{story.name}: {story.guest.config.disks[index].file_system} of disk {index} is clean "
            f"at [cyan]{point.name}[/cyan], taken under load"
        )

    def _prove_database(self, story: GuestStory, point: Point) -> str:
        total = opens_database(self._stack.layout, point.image(0), point.image(1))
        return (
            f"{story.name}: PostgreSQL starts from [cyan]{point.name}[/cyan]; the sums of "
            f"all balances agree ({total})"
        )

    def _prove_log(self, story: GuestStory, point: Point) -> str:
        last = has_whole_log(self._stack.layout, point.image(0))
        return (
            f"{story.name}: the root file system at [cyan]{point.name}[/cyan] has all that its "
            f"service had written, up to number {last}"
        )

    def _go_on(self) -> None:
        """The guests go back to work: the stack stays up."""
        for story in self._guests:
            story.guest.power_on()
            story.guest.start_workload()

    def _rehearse(self) -> Rehearsed:
        self._step("7  Test failover of all of them by a recovery plan, replication goes on")
        rehearsal = Rehearsal(self._stack, self._done)
        rehearsed = rehearsal.run([story.name for story in self._guests])
        for one in rehearsed.started:
            what = "; ".join((*one.file_systems, one.detail)).strip("; ").replace("\n", " ")
            self._done(f"{one.machine} from [cyan]{one.point}[/cyan]: {what}")
        if rehearsed.rpo_seconds_max > RPO_SECONDS_MAX:
            raise IntegrityError(
                f"RPO durable rose to {rehearsed.rpo_seconds_max:.0f} s during the test failover"
            )
        self._done(
            f"all up after {rehearsed.seconds:.0f} s, RPO durable at most "
            f"{rehearsed.rpo_seconds_max:.1f} s meanwhile; cleaned up, nothing is left of it"
        )
        return rehearsed

    def _need_news(self, story: GuestStory) -> AgentNews:
        news = self._stack.news(story.name)
        assert news is not None, "an agent that replicates has told of itself"
        return news

    def _table(self) -> Table:
        table = Table(title="Understudy lab", title_justify="left")
        table.add_column("machine")
        for heading in (
            "disks",
            "initial MB/s",
            "RPO durable",
            "RPO restorable",
            "points",
            "changed",
            "sent",
            "ratio",
        ):
            table.add_column(heading, justify="right")
        for story in self._guests:
            news = self._need_news(story)
            ratio = news.changed_bytes / news.sent_bytes if news.sent_bytes else 0.0
            table.add_row(
                story.name,
                str(len(story.guest.config.disks)),
                f"{story.seed_bytes / story.seed_seconds / 1e6:.0f}",
                f"{story.rpo_durable_seconds:.1f} s",
                f"{story.rpo_restorable_seconds:.1f} s",
                str(len(list_points(self._stack.layout, story.name))),
                _mebibytes(news.changed_bytes),
                _mebibytes(news.sent_bytes),
                f"{ratio:.1f}",
            )
        return table


def _recovery_table(rehearsed: Rehearsed) -> Table:
    table = Table(title="Test failover", title_justify="left")
    for heading in ("machine", "point", "consistency", "boots"):
        table.add_column(heading)
    for heading in ("disks after", "RTO"):
        table.add_column(heading, justify="right")
    for one in rehearsed.started:
        table.add_row(
            one.machine,
            one.point,
            one.consistency,
            "its own system" if one.guest == "own" else "recovery guest",
            f"{one.disks_seconds:.2f} s",
            f"{one.rto_seconds:.1f} s",
        )
    return table


def _share_done(news: AgentNews) -> float:
    """How much of what was to do is done, 0 to 1; while under way never quite all."""
    total = news.changed_bytes + news.todo_bytes
    done = news.changed_bytes + news.under_way_bytes
    return min(done / total, 0.99) if total else 0.0


def _spread(points: Sequence[Point]) -> list[Point]:
    """The first and the last of some points."""
    return [points[0], points[-1]] if len(points) > 1 else list(points)


def _mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):,.1f} MiB"
