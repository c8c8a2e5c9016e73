# Checks the vectors beside this file without the code that they are for:
# Python 3, standard library only. SOH is written as | in them.
import hashlib, json, pathlib, sys

REWRITTEN = {"8", "9", "34", "49", "52", "56", "43", "97", "122", "10", "20500", "20501"}

def covered(message):
    fields = message.split(b"\x01")
    assert fields.pop() == b"", "no SOH at the end"
    return b"".join(f + b"\x01" for f in fields if f.split(b"=", 1)[0].decode() not in REWRITTEN)

def framed(message):
    """Whether BodyLength(9) and CheckSum(10) are right."""
    head, rest = message.split(b"\x01", 2)[:2], message.split(b"\x01", 2)[2]
    body = rest[: rest.rindex(b"10=")]
    total = sum(message[: len(message) - len(b"10=000\x01")]) % 256
    return head[1] == b"9=%d" % len(body) and message.endswith(b"\x0110=%03d\x01" % total)

here = pathlib.Path(__file__).parent
digests, checked = {}, 0
for v in json.loads((here / "fix.json").read_text()):
    message = v["message"].replace("|", "\x01").encode()
    if "refused" in v:
        continue
    assert framed(message), v["name"]
    assert covered(message) == v["covered"].replace("|", "\x01").encode(), v["name"]
    digests[v["name"]] = hashlib.sha256(covered(message)).hexdigest()
    assert digests[v["name"]] == v["sha256"], v["name"]
    if "same_as" in v:
        assert digests[v["same_as"]] == v["sha256"], v["name"]
    if "differs_from" in v:
        assert digests[v["differs_from"]] != v["sha256"], v["name"]
    checked += 1
for v in json.loads((here / "ws.json").read_text()):
    if "refused" in v:
        continue
    frame = json.loads(v["frame"])
    assert frame["message"] == v["message"], v["name"]
    assert hashlib.sha256(frame["message"].encode()).hexdigest() == v["sha256"], v["name"]
    checked += 1
print(checked)
