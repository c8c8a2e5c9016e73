// A bot that asks for two orders and prints what became of them. It holds no
// key and opens no connection: inkan run gave it one to its signer.
// Node, without packages.
import crypto from "node:crypto"
import http from "node:http"
import net from "node:net"

const socket = new net.Socket({ fd: Number(process.env.INKAN_FD) })
const agent = new http.Agent({ keepAlive: true, maxSockets: 1 }) // requests take turns
agent.createConnection = () => socket

const ask = (action) => new Promise((done, fail) => {
  const request = http.request({ agent, method: "POST", path: "/v1/actions" }, async (answer) => {
    const result = JSON.parse((await answer.toArray()).join(""))
    done({ status: answer.statusCode, ...result })
  })
  request.on("error", fail).end(JSON.stringify(action))
})

for (const quantity of ["400", "4000"]) { // the second is worth more than the scope allows
  const r = await ask({ id: crypto.randomBytes(16).toString("base64url"), aud: "XPAR", act: "order.new",
    ord: { ClOrdID: "A-" + quantity, SecurityID: "FR0000120271", SecurityIDSource: "4", Side: "1", OrdType: "2",
      Price: "61.24", OrderQty: quantity, Currency: "EUR", TimeInForce: "0" } })
  console.log(r.jws ? `signed as number ${r.counter} for the venue: ${r.jws.slice(0, 40)}...` : `refused: ${r.rule}: ${r.detail}`)
}
socket.destroy()
