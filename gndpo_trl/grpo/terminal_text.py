"""Text of data and models for a terminal."""

# What moves the cursor, clears the screen, sets the window's title or turns the direction of writing must not reach a
# terminal: control characters become their pictures, and what has none the sign for an unknown one.
HARMLESS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}
HARMLESS |= dict.fromkeys(
    [*range(0x80, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)], "\ufffd"
)


def harmless(text: str) -> str:
    """The text with control characters that a terminal shows and does not obey; line breaks and tabs stay."""
    return text.translate(HARMLESS)
