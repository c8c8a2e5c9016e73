package verify

import (
	"crypto"
	"errors"
	"net/http"

	"inkan/internal/httpsig"
)

// RequestSignature says what [Receiver.Middleware] wants of a request's own
// signature (RFC 9421), which an agent's TLS key makes over method, authority, path,
// query, Content-Digest and Agent-Action. docs/protocol.md has the profile.
type RequestSignature struct {
	// Required refuses a request without one. One that is there must verify in any case.
	Required bool
	// Key returns the key that signs an agent's requests, by its JWK thumbprint (RFC
	// 7638), and the agent's SPIFFE ID. It must trust that the key is the agent's. Of an error
	// the client is told what a *[Refusal] says, and nothing of any other. See PeerKey.
	Key func(req *http.Request, keyID string) (crypto.PublicKey, string, error)
}

// PeerKey takes the key of the TLS client certificate and the agent's SPIFFE ID in
// it. The server must have verified the certificate.
func PeerKey(req *http.Request, _ string) (crypto.PublicKey, string, error) {
	if req.TLS == nil || len(req.TLS.PeerCertificates) == 0 {
		return nil, "", refuse(ReasonRequestSignature, "there is no TLS client certificate whose key could have signed the request")
	}
	c := req.TLS.PeerCertificates[0]
	if len(c.URIs) != 1 || c.URIs[0].Scheme != "spiffe" {
		return nil, "", refuse(ReasonRequestSignature, "the TLS client certificate has not exactly one SPIFFE ID")
	}
	return c.PublicKey, c.URIs[0].String(), nil
}

// checkRequest checks what a request says of itself: its Content-Digest and its
// signature. It returns the SPIFFE ID of the agent that signed; empty: none did.
func (r *Receiver) checkRequest(req *http.Request, body []byte) (agent string, err error) {
	if d := req.Header.Values(httpsig.ContentDigest); len(d) > 0 {
		if err := httpsig.CheckDigest(d, body); err != nil {
			return "", refuse(ReasonBody, "%v", err)
		}
	}
	want := r.c.RequestSignature
	switch {
	case want == nil:
		return "", nil
	case !httpsig.Present(req) && !want.Required:
		return "", nil
	case !httpsig.Present(req):
		return "", refuse(ReasonRequestSignature, "the request has no signature %s (RFC 9421)", httpsig.Label)
	}
	var unknown error
	key := func(id string) (key crypto.PublicKey, err error) {
		key, agent, err = want.Key(req, id)
		if err == nil && agent == "" {
			err = errors.New("the key is no agent's")
		}
		unknown = err
		return key, err
	}
	err = httpsig.Verify(req, body, key, r.c.Now(), r.c.MaxSkew)
	if refusal, ok := errors.AsType[*Refusal](unknown); ok {
		return "", refusal
	}
	switch {
	case unknown != nil:
		return "", &Refusal{Reason: ReasonRequestSignature, Detail: "the request's signature is by a key that is not known here as an agent's", Cause: unknown}
	case err != nil:
		return "", refuse(ReasonRequestSignature, "%v", err)
	}
	return agent, nil
}
