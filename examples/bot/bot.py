# A bot that asks for two orders and prints what became of them. It holds no
# key and opens no connection: inkan run gave it one to its signer.
# Python 3, standard library only.
import base64, http.client, json, os, secrets, socket

signer = http.client.HTTPConnection("signer")
signer.sock = socket.socket(fileno=int(os.environ["INKAN_FD"]))

for quantity in ("400", "4000"):  # the second is worth more than the scope allows
    action = {"id": base64.urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("="), "aud": "XPAR", "act": "order.new",
              "ord": {"ClOrdID": "A-" + quantity, "SecurityID": "FR0000120271", "SecurityIDSource": "4", "Side": "1", "OrdType": "2",
                      "Price": "61.24", "OrderQty": quantity, "Currency": "EUR", "TimeInForce": "0"}}
    signer.request("POST", "/v1/actions", json.dumps(action))
    answer = signer.getresponse()
    result = json.loads(answer.read())
    if answer.status == 200:
        print("signed as number", result["counter"], "for the venue:", result["jws"][:40] + "...")
    else:
        print("refused:", result["rule"] + ":", result["detail"])
