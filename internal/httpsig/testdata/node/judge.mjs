// Two implementations of RFC 9421 that are not Inkan's: reads requests as JSON
// lines, verifies each with both, signs it again with one, and says so.
import { createPublicKey, createPrivateKey, verify as check, sign } from "node:crypto"
import { createInterface } from "node:readline"
import messageSignatures from "http-message-signatures"
import * as webBotAuth from "web-bot-auth"

const { httpbis } = messageSignatures
const ecdsa = { hash: "sha256", dsaEncoding: "ieee-p1363" }

for await (const line of createInterface({ input: process.stdin })) {
  const { request, jwk } = JSON.parse(line)
  const key = createPublicKey({ key: jwk, format: "jwk" })
  const holds = (data, signature) => check(jwk.kty === "OKP" ? null : ecdsa.hash, data, { key, dsaEncoding: ecdsa.dsaEncoding }, signature)
  const id = await webBotAuth.jwkToKeyID(jwk, webBotAuth.helpers.WEBCRYPTO_SHA256, webBotAuth.helpers.BASE64URL_DECODE)
  const out = { id }
  try {
    out.first = await httpbis.verifyMessage({
      keyLookup: async (p) => p.keyid === id ? { id, algs: [jwk.kty === "OKP" ? "ed25519" : "ecdsa-p256-sha256"], verify: async (data, signature) => holds(data, signature) } : null,
      requiredParams: ["created", "expires", "keyid", "nonce", "tag"], requiredFields: ["@method", "@authority", "@path", "content-digest", "agent-action"],
    }, request)
  } catch (e) { out.first = String(e) }
  try {
    out.second = await webBotAuth.verify(request, async (data, signature, params) =>
      params.keyid === id && params.tag === "web-bot-auth" && webBotAuth.validateNonce(params.nonce) && holds(Buffer.from(data), Buffer.from(signature)))
  } catch (e) { out.second = String(e) }
  if (jwk.d) {
    const own = createPrivateKey({ key: jwk, format: "jwk" })
    const headers = Object.fromEntries(Object.entries(request.headers).filter(([n]) => !n.startsWith("signature")))
    const now = Math.floor(Date.now() / 1000)
    out.signed = (await httpbis.signMessage({
      key: { id, alg: "ecdsa-p256-sha256", sign: async (data) => sign(ecdsa.hash, data, { key: own, dsaEncoding: ecdsa.dsaEncoding }) }, name: "agent",
      fields: ["@method", "@authority", "@path", ...(new URL(request.url).search ? ["@query"] : []), "content-digest", "agent-action"], params: ["created", "expires", "keyid", "alg", "nonce", "tag"],
      paramValues: { created: new Date(now * 1000), expires: new Date((now + 60) * 1000), nonce: webBotAuth.generateNonce(), tag: "web-bot-auth" },
    }, { ...request, headers })).headers
  }
  console.log(JSON.stringify(out))
}
