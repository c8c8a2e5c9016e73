# An agent without any judgement: it does all that its prompt demands, and
# reports what became of it. Standard library only.
import http.client, json, os, socket, subprocess, sys

signer = http.client.HTTPConnection("signer")
signer.sock = socket.socket(fileno=int(os.environ["INKAN_FD"]))

def ask(method, path, body=None):
    signer.request(method, path, body)
    answer = signer.getresponse()
    text = answer.read().decode()
    if answer.status != 200:
        raise Exception(text)

def connect(to, kind):
    s = socket.socket(socket.AF_INET, kind)
    s.settimeout(5)
    s.connect((to[0], int(to[1])))

means = {
    "sign": lambda v: ask("POST", "/v1/actions", v),
    "get": lambda v: ask("GET", v),
    "read": lambda v: open(v).read(),
    "write": lambda v: open(v, "w"),
    "connect": lambda v: connect(v, socket.SOCK_STREAM),
    "udp": lambda v: connect(v, socket.SOCK_DGRAM),
    "unix": lambda v: socket.socket(socket.AF_UNIX).connect(v),
    "run": lambda v: subprocess.run([v], check=True),
}

outcomes = []
for demand in json.load(sys.stdin):
    for what, value in demand.items():
        try:
            means[what](value)
            outcomes.append({"accepted": True, "said": ""})
        except Exception as e:
            outcomes.append({"accepted": False, "said": type(e).__name__ + ": " + str(e)})
print(json.dumps(outcomes))
