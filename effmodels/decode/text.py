"""Tokens to text as they come: whole characters only, and nothing past a stop string."""


class TextStream:
    """`add` a token, get the text that is now certain; what could still be part of a character or a stop string is held back."""

    def __init__(self, tokenizer, stop=()):
        if any(not s for s in stop):
            raise ValueError("a stop string must not be empty.")
        self.decoder, self.stop, self.stopped = tokenizer.stream(), tuple(stop), False
        self.held = ""  # decoded, but perhaps the beginning of a stop string

    def add(self, token):
        """The new certain text after one more token; "" once stopped."""
        return self._take(self.decoder.push(token), last=False)

    def finish(self):
        """What was held back; incomplete characters as replacement characters."""
        return self._take(self.decoder.flush(), last=True)

    def _take(self, new, last):
        if self.stopped:
            return ""
        text, self.held = self.held + new, ""
        found = [i for i in (text.find(s) for s in self.stop) if i >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        certain = len(text) - (0 if last else self._partial_stop(text))
        self.held = text[certain:]
        return text[:certain]

    def _partial_stop(self, text):
        """Length of the longest end of the text that begins a stop string."""
        return max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
