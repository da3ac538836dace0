from export.demo import corpus


def test_held_out_files_are_in_no_training_document() -> None:
    trained_on = corpus.documents(held_out=False)
    held_out = set(corpus.texts(held_out=True)) - {""}
    assert held_out
    assert not held_out & set(trained_on)


def test_the_split_leaves_no_file_out_and_uses_none_twice() -> None:
    num_files = len(corpus.source_files())
    assert len(corpus.texts(held_out=True)) + len(corpus.texts(held_out=False)) == num_files


def test_a_documented_function_becomes_a_chat() -> None:
    (first, *_) = corpus.chats('def f(x):\n    """Add one."""\n    return x + 1\n')
    assert "<|turn>user\nWrite `f`. Add one.<turn|>\n<|turn>model\ndef f(x):" in first
    assert first.endswith("return x + 1<turn|>\n")


def test_undocumented_long_or_broken_sources_give_no_chat() -> None:
    long = 'def f():\n    """Doc."""\n' + "    x = 1\n" * corpus.MAX_FUNCTION_CHARS
    for source in ("def f(): pass", "def f(:", long):
        assert list(corpus.chats(source)) == []
