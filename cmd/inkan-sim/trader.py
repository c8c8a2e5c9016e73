# An agent that does what it is told, job by job, and reports what became of
# it. It asks its signer for a signature, and sends the order to the venue
# through the proxy. Standard library only; it holds no key.
import base64, hashlib, http.client, json, os, secrets, socket, sys

class Signer(http.client.HTTPConnection):
    def connect(self):
        if "INKAN_FD" in os.environ:
            self.sock = socket.socket(fileno=int(os.environ["INKAN_FD"]))
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(sys.argv[2])

signer = Signer("signer")
proxy = http.client.HTTPConnection(*sys.argv[1].split(":"), timeout=30)

def sign(action, body):
    action["id"] = base64.urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("=")
    action["native"] = {"fmt": "http-body", "sha-256": hashlib.sha256(body).hexdigest()}
    signer.request("POST", "/v1/actions", json.dumps(action))
    answer = signer.getresponse()
    text = answer.read().decode()
    if answer.status != 200:
        raise Exception("the signer: " + text)
    return json.loads(text)["jws"]

def trade(job):
    body = job.get("body", "").encode()
    headers = {"Content-Type": "application/json"}
    if "action" in job:
        headers["Agent-Action"] = sign(job["action"], body)
    if "header" in job:
        headers["Agent-Action"] = job["header"]
    body = job.get("instead", job.get("body", "")).encode()
    url = job.get("url", "/orders")
    proxy.request(job.get("method", "POST"), url, body, headers)
    answer = proxy.getresponse()
    text = answer.read().decode()
    if answer.status != 200:
        raise Exception("%d %s" % (answer.status, text))
    return text

outcomes = []
for job in json.load(sys.stdin):
    try:
        outcomes.append({"accepted": True, "said": trade(job)})
    except Exception as e:
        proxy.close()
        outcomes.append({"accepted": False, "said": type(e).__name__ + ": " + str(e)})
print(json.dumps(outcomes))
