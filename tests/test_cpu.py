"""What the processor offers."""

from bn_cy._openmp import cpu


def test_cache_sizes_are_those_that_linux_tells(tmp_path):
    for index, (level, size) in enumerate([("1", "32K"), ("2", "512K"), ("3", "32768K")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "level").write_text(f"{level}\n")
        (folder / "size").write_text(f"{size}\n")
    assert cpu.cache_bytes(2, tmp_path) == 512 << 10
    assert cpu.cache_bytes(3, tmp_path) == 32 << 20


def test_cache_sizes_without_a_word_from_linux(tmp_path):
    of_c_library = cpu.cache_bytes(3, tmp_path / "none")
    assert of_c_library >= 0  # not sysconf's -1
    folder = tmp_path / "index0"
    folder.mkdir()
    (folder / "level").write_text("3\n")  # and no size
    assert cpu.cache_bytes(3, tmp_path) == of_c_library


def test_a_core_has_caches():
    assert 0 < cpu.own_cache() <= cpu.last_level_cache()
