"""Text from a stream of tokens: whole characters, nothing of a stop string, however either is cut into tokens."""
import codecs

import pytest

from effmodels.decode.text import TextStream


class Pieces:
    """A tokenizer whose ids index byte strings."""

    def __init__(self, pieces):
        self.pieces = pieces

    def stream(self):
        decoder, pieces = codecs.getincrementaldecoder("utf-8")(errors="replace"), self.pieces

        class Decoder:
            def push(self, *ids):
                return decoder.decode(b"".join(pieces[i] for i in ids))

            def flush(self):
                return decoder.decode(b"", final=True)

        return Decoder()


def run(pieces, stop=()):
    """The texts of every token, the end, and whether a stop string was met."""
    text = TextStream(Pieces(pieces), stop)
    parts = [text.add(i) for i in range(len(pieces))]
    return parts, text.finish(), text.stopped


def test_characters_come_out_whole():
    parts, end, stopped = run([b"a", "é".encode()[:1], "é".encode()[1:] + b"b", *(bytes([b]) for b in "🙂".encode())])
    assert parts == ["a", "", "éb", "", "", "", "🙂"] and end == "" and not stopped


def test_a_character_cut_off_at_the_end_is_replaced_there():
    parts, end, _ = run([b"a", "é".encode()[:1]])
    assert parts == ["a", ""] and end == "\ufffd"


@pytest.mark.parametrize("cuts", range(1, 1 << 5))
def test_stop_strings_split_anywhere(cuts):
    """All ways to cut "xab\\nend" into tokens: what comes out is the text before the stop string, and nothing later."""
    whole, pieces, at = b"xab\nend", [], 0
    for i in range(1, len(whole)):
        if cuts >> (i - 1) & 1:
            pieces.append(whole[at:i])
            at = i
    parts, end, stopped = run([*pieces, whole[at:]], stop=("b\ne", "zz"))
    assert "".join(parts) + end == "xa" and stopped


def test_what_only_begins_like_a_stop_string_is_given_back():
    parts, end, stopped = run([b"a", b"\n", b"b"], stop=("\n\n",))
    assert parts == ["a", "", "\nb"] and end == "" and not stopped
    assert run([b"a", b"\n"], stop=("\n\n",)) == (["a", ""], "\n", False)


def test_the_first_of_several_stop_strings_counts():
    assert run([b"one two", b" three"], stop=("three", "two"))[0] == ["one ", ""]
    assert run([b"one STOP"], stop=("STOP",)) == (["one "], "", True)


def test_a_stop_string_with_a_character_of_two_bytes():
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert run([b"xa", first, second + b"y"], stop=("aé",)) == (["x", "", ""], "", True)


def test_overlapping_beginnings_hold_back_the_longest():
    parts, end, stopped = run([b"aa", b"a", b"b"], stop=("aab",))
    assert "".join(parts) + end == "a" and stopped


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="a stop string must not be empty"):
        TextStream(Pieces([]), stop=("",))
