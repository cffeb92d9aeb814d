"""The pool: what goes in and out, in which order."""

from __future__ import annotations

import copy

import pytest
import torch

from lora_kernels.serving import AdapterInUse, AdapterPool, AdapterPoolFull
from tests.serving.adapters import (
    SHAPES,
    adapter,
    assert_serves,
    assert_unchanged,
    make_pool,
    save,
    snapshot,
)


def filled(count: int = 3, **options) -> AdapterPool:
    """Adapters "0", "1", ... of one page at each module, oldest first."""
    pool = make_pool(**options)
    for i in range(count):
        pool.load(str(i), *adapter(i))
    return pool


@pytest.mark.parametrize(
    "ranks", [{}, {"up": 16}, {"up": 17, "mid.down": 40}, {"up": 33, "mid.down": 1}]
)
def test_an_adapter_is_served_as_it_was_given(ranks, tmp_path):
    pool = make_pool(pages=8)
    state, config = adapter(1, ranks=ranks)
    pool.load("state", state, config)
    pool.load("disk", save(tmp_path, state, config))
    pool.load("other", *adapter(2))
    for name in ("state", "disk"):
        for module in SHAPES:
            r = ranks.get(module, 3)
            slot = pool.slot_of(name)
            assert int(pool.pages(module).ranks[slot]) == r
            assert float(pool.pages(module).scales[slot]) == torch.tensor(6 / r).item()
        assert_serves(pool, name, state)
    assert_serves(pool, "other", adapter(2)[0])
    for module in SHAPES:
        pool.pages(module).check()


def test_scales_follow_rslora_and_the_patterns():
    pool = make_pool()
    state, config = adapter(
        r=4, ranks={"up": 9}, use_rslora=True, lora_alpha=6, alpha_pattern={"up": 12.0}
    )
    slot = pool.load("a", state, config)
    assert float(pool.pages("up").scales[slot]) == 4.0  # 12 / √9
    assert float(pool.pages("mid.down").scales[slot]) == 3.0  # 6 / √4


def test_a_module_that_an_adapter_leaves_alone_costs_no_page():
    pool = make_pool()
    state, config = adapter(target_modules=["up"])
    state = {k: t for k, t in state.items() if ".up." in k}
    slot = pool.load("a", state, config)
    assert pool.stats().pages_used == 1
    assert int(pool.pages("mid.down").ranks[slot]) == 0


def test_the_least_recently_used_leaves_first():
    pool = filled()
    with pool.route(["0", "0", None]):
        pass
    pool.load("3", *adapter(3))
    assert pool.names() == ("2", "0", "3")
    pool.prefetch(["2"])
    pool.load("4", *adapter(4))
    assert pool.names() == ("3", "2", "4")
    assert pool.stats().evictions == 2


def test_only_those_leave_who_help():
    """The oldest has no page where one is short."""
    pool = make_pool(slots=4, pages=3)
    state, config = adapter(0, target_modules=["up"])
    pool.load("up only", {k: t for k, t in state.items() if ".up." in k}, config)
    pool.load("a", *adapter(1))
    pool.load("b", *adapter(2, ranks={"mid.down": 17}))
    pool.unload("a")
    state, config = adapter(3, ranks={"down": 32}, target_modules=["down"], r=32)
    pool.load("down only", {k: t for k, t in state.items() if ".down." in k}, config)
    assert pool.names() == ("up only", "down only")


def test_pinned_and_held_adapters_stay_and_the_error_names_them():
    pool = filled()
    pool.pin("1")
    pool.acquire(["0", "0"])
    pool.load("3", *adapter(3))
    assert pool.names() == ("1", "0", "3")
    pool.acquire(["3"])
    before = snapshot(pool)
    with pytest.raises(AdapterPoolFull, match=r"no room for 4: needs 1 more slots.*pinned: 1") as e:
        pool.load("4", *adapter(4))
    assert (e.value.pinned, e.value.in_use) == (("1",), ("0", "3"))
    assert_unchanged(pool, before)
    pool.release(["3"])
    pool.load("4", *adapter(4))
    assert pool.names() == ("1", "0", "4")


def test_an_adapter_larger_than_the_pool_says_where():
    pool = filled(2, pages=2)
    before = snapshot(pool)
    with pytest.raises(AdapterPoolFull, match=r"needs 3 pages at up, 1 more than its 2"):
        pool.load("big", *adapter(ranks={"up": 40}))
    assert_unchanged(pool, before)
    assert "big" not in pool.names()


def test_a_batch_of_more_adapters_than_slots_changes_nothing():
    pool = filled(3)
    pool.load("3", *adapter(3))  # "0" is out, in the host's cache
    before = snapshot(pool)
    with pytest.raises(AdapterPoolFull, match="needs 1 more slots"):
        pool.acquire(["0", "1", "2", "3"])
    assert_unchanged(pool, before)
    pool.release([None])
    assert pool.stats().in_use == 0


def test_a_batch_does_not_put_out_its_own_adapters():
    pool = filled(4)  # "0" is out, "1" is the oldest
    with pool.route(["0", "1", "0", ""]) as slots:
        assert slots.tolist() == [pool.slot_of("0"), pool.slot_of("1"), pool.slot_of("0"), -1]
        assert pool.names() == ("3", "0", "1")
    assert (pool.stats().hits, pool.stats().misses) == (1, 1)


def test_references_are_counted_for_each_route():
    pool = filled(1)
    pool.acquire(["0", "0"])
    with pool.route(["0"]):
        pool.release(["0"])
        assert pool.stats().in_use == 1
        with pytest.raises(AdapterInUse, match=r"'0' cannot be unloaded: 1 route"):
            pool.unload("0")
        with pytest.raises(AdapterInUse, match="cannot be replaced"):
            pool.replace("0", *adapter(5))
        with pytest.raises(AdapterInUse, match="cannot be evicted"):
            pool.evict("0")
    with pytest.raises(ValueError, match="'0', which nobody holds"):
        pool.release(["0"])
    pool.unload("0")
    assert pool.names() == () and pool.stats().pages_used == 0


def test_a_route_lets_go_after_an_error():
    pool = filled(1)
    with pytest.raises(ZeroDivisionError), pool.route(["0"]):
        raise ZeroDivisionError
    assert pool.stats().in_use == 0
    assert pool.active_slots() is None


def test_routes_by_slot():
    pool = filled(2)
    with pool.route(torch.tensor([[1, -1], [0, 1]], dtype=torch.int32)) as slots:
        assert slots.tolist() == [[1, -1], [0, 1]]
        assert pool.stats().in_use == 2
    for bad in ([2], [-2], [7]):
        with pytest.raises(ValueError, match=rf"slots: got {bad[0]}, expected -1 or"):
            pool.route(torch.tensor(bad, dtype=torch.int32)).__enter__()
    with pytest.raises(TypeError, match="slots: got dtype float32"):
        pool.route(torch.zeros(1)).__enter__()
    assert pool.stats().in_use == 0


def test_pinning():
    pool = filled(1)
    pool.evict("0")
    pool.pin("0")
    assert pool.stats().pinned == 1 and pool.slot_of("0") == 0
    for call in (pool.unload, pool.evict):
        with pytest.raises(AdapterInUse, match="is pinned"):
            call("0")
    pool.replace("0", *adapter(7))
    assert pool.stats().pinned == 1
    pool.unpin("0")
    pool.unload("0")
    pool.load("1", *adapter(1), pin=True)
    assert pool.stats().pinned == 1


def test_unknown_and_known_names():
    pool = filled(1)
    with pool.route([None]):
        for call in (pool.unload, pool.evict, pool.pin, pool.unpin, pool.slot_of):
            with pytest.raises(KeyError, match="got 'x', which the pool does not know"):
                call("x")
    with pytest.raises(KeyError, match="'x'"):
        pool.replace("x", *adapter())
    with pytest.raises(KeyError, match="'x'"):
        pool.acquire(["0", "x"])
    with pytest.raises(ValueError, match="name: got '0', which the pool has already"):
        pool.load("0", *adapter())
    for name in ("", None, 3):
        with pytest.raises(TypeError, match="name: got"):
            pool.load(name, *adapter())
    with pytest.raises(TypeError, match="names: got the string '0'"):
        pool.acquire("0")
    with pytest.raises(TypeError, match="names: got 0, expected a string or None"):
        pool.acquire([0])
    with pytest.raises(KeyError, match=r"module: got 'x', expected one of up, mid.down"):
        pool.pages("x")
    assert pool.stats().in_use == 0


@pytest.mark.parametrize("ranks", [{}, {"up": 40}, {"up": 17, "mid.down": 40}])
def test_replace_keeps_the_slot_and_gives_back_what_is_too_much(ranks):
    pool = make_pool()
    pool.load("x", *adapter(8))
    slot = pool.load("a", *adapter(0, r=20))
    pool.load("y", *adapter(9))
    state, config = adapter(1, ranks=ranks)
    pool.replace("a", state, config)
    assert pool.slot_of("a") == slot and pool.names() == ("x", "a", "y")
    used = 4 + sum(-(-ranks.get(m, 3) // 16) for m in SHAPES)
    assert pool.stats().pages_used == used
    assert_serves(pool, "a", state)
    assert_serves(pool, "x", adapter(8)[0])
    assert_serves(pool, "y", adapter(9)[0])
    pool.unload("a")
    assert pool.stats().pages_used == 4


def test_replace_makes_room_or_changes_nothing():
    pool = filled(2, pages=3)
    pool.pin("1")
    before = snapshot(pool)
    with pytest.raises(AdapterPoolFull, match=r"no room for 0: needs 2 pages at up"):
        pool.replace("0", *adapter(5, ranks={"up": 40}))
    assert_unchanged(pool, before)
    assert_serves(pool, "0", adapter(0)[0])
    pool.unpin("1")
    pool.replace("0", *adapter(5, ranks={"up": 40}))
    assert pool.names() == ("0",)


def test_replace_of_an_adapter_that_is_out_changes_its_copy_on_the_host():
    pool = filled(1)
    pool.evict("0")
    state, config = adapter(5)
    pool.replace("0", state, config)
    assert pool.names() == () and pool.stats().pages_used == 0
    assert_serves(pool, "0", state)


def test_a_state_dict_is_copied():
    pool = make_pool()
    state, config = adapter(0)
    pool.load("a", state, config)
    pool.evict("a")
    for t in state.values():
        t.fill_(7)
    assert_serves(pool, "a", adapter(0)[0])


def test_what_left_comes_back_without_the_disk(tmp_path):
    pool = make_pool()
    state, config = adapter(0)
    folder = save(tmp_path / "a", state, config)
    pool.register("a", folder)
    assert pool.stats().disk_reads == 0 and pool.stats().known == 1
    assert_serves(pool, "a", state)
    pool.evict("a")
    for file in folder.iterdir():
        file.unlink()
    assert_serves(pool, "a", state)
    assert pool.stats().disk_reads == 1 and pool.stats().evictions == 1


def test_the_hosts_cache_is_bounded(tmp_path):
    each = 3 * sum(k + n for k, n in SHAPES.values()) * 4
    pool = make_pool(slots=1, host_bytes=2 * each + 1)
    folders = [save(tmp_path / str(i), *adapter(i)) for i in range(3)]
    pool.load("state", *adapter(9))
    for i, folder in enumerate(folders):
        pool.register(str(i), folder)
    for i in (0, 1, 1, 2, 1):
        assert_serves(pool, str(i), adapter(i)[0])
        assert pool.stats().host_bytes <= 2 * each
    # A state dict is kept as long as the disk has the others: one place is left for these.
    assert pool.stats().disk_reads == 4
    assert_serves(pool, "state", adapter(9)[0])


@pytest.mark.parametrize("host_bytes", [0, 100])
def test_a_state_dict_that_is_gone_has_to_be_given_again(host_bytes):
    pool = filled(1, host_bytes=host_bytes)
    assert_serves(pool, "0", adapter(0)[0])
    pool.evict("0")
    with pytest.raises(KeyError, match=r"'0' was a state dict.*give it again with replace"):
        pool.acquire(["0"])
    pool.replace("0", *adapter(0))  # goes nowhere: the cache takes none
    with pytest.raises(KeyError, match="'0' was a state dict"):
        pool.prefetch(["0"])


def test_a_directory_without_its_files_is_not_registered(tmp_path):
    pool = make_pool()
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json: no such file"):
        pool.register("a", tmp_path)
    assert pool.stats().known == 0


def test_a_file_that_went_bad_holds_nothing(tmp_path):
    pool = filled(1)
    folder = save(tmp_path, *adapter(1))
    pool.register("bad", folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 9)
    before = snapshot(pool)
    with pytest.raises(ValueError, match="is damaged"):
        pool.acquire(["0", "bad"])
    assert_unchanged(pool, before)


def test_a_copy_of_a_model_shares_the_pool():
    pool = filled(1)
    assert copy.deepcopy({"pool": pool})["pool"] is pool


def test_writes_come_after_the_readers_of_the_pages(monkeypatch):
    """The order in which a device is asked for copies, told by a transfer that takes notes."""
    notes = []

    class Notes:
        def __init__(self, device):
            self.count = 0

        def events(self):
            self.count += 1
            return {7: f"route {self.count}"}

        def after(self, readers):
            notes.extend(f"after {r}" for r in readers)

        def copying(self):
            from contextlib import nullcontext

            notes.append("copy")
            return nullcontext()

        def written(self):
            return "written"

        def wait(self, written):
            notes.append(f"wait {written}")
            return False

    monkeypatch.setattr("lora_kernels.serving.slots.Transfer", Notes)
    pool = make_pool(slots=1)
    pool.load("a", *adapter(0))
    assert notes == ["copy"]
    for _ in range(2):
        with pool.route(["a"]):
            pass
    assert notes == ["copy", "wait written", "wait written"]
    notes.clear()
    pool.load("b", *adapter(1))
    assert notes == ["after route 2", "copy", "copy"]  # the rank of a's slot, then b
    notes.clear()
    with pool.route(["b"]):
        pass
    pool.replace("b", *adapter(2))
    assert notes == ["wait written", "after route 3", "copy"]


@pytest.mark.gpu
def test_on_a_gpu_routes_see_whole_adapters():
    """Many loads and evictions with no wait of the host between them."""
    from lora_kernels.functional import gather_lora

    pool = make_pool(slots=2, pages=2, device="cuda")
    for i in range(6):
        pool.load(str(i), *adapter(i))
    x = torch.randn(2, 20, device="cuda")
    found = []
    for step in range(60):
        names = [str(step % 6), str((step * 5 + 1) % 6)]
        with pool.route(names) as slots:
            found.append((names, gather_lora(x, pool.pages("up"), slots)))
    for names, y in found:
        for row, name in enumerate(names):
            fresh = make_pool(slots=1, device="cuda")
            fresh.load(name, *adapter(int(name)))
            torch.cuda.synchronize()
            slots = torch.zeros(2, dtype=torch.int32, device="cuda")
            assert torch.equal(y[row], gather_lora(x, fresh.pages("up"), slots)[row])
