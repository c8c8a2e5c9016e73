package wire

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"

	"inkan/internal/httpsig"
	"inkan/internal/jws"
	"inkan/scope"
)

// RuleRequestSignature refuses a request that is not one to sign.
const RuleRequestSignature scope.Rule = "request_signature"

// maxSigned bounds the body of a request that is signed, in bytes: it is read
// before the request is sent.
const maxSigned = 1 << 20

// sign returns a request with a signature by the agent's TLS key (RFC 9421), made
// of the request that will be sent: nobody hands in what is signed. The action that it
// carries must be this agent's, and for this body. It closes the request's body.
func (i *Identity) sign(req *http.Request) (*http.Request, error) {
	body, err := drain(req)
	if err != nil {
		return nil, err
	}
	g, err := i.valid()
	if err != nil {
		return nil, err
	}
	if err := carries(req, g.agent, body); err != nil {
		return nil, refuse(RuleRequestSignature, "%v", err)
	}
	out := req.Clone(req.Context())
	out.Body, out.ContentLength, out.TransferEncoding = io.NopCloser(bytes.NewReader(body)), int64(len(body)), nil
	out.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
	if len(body) == 0 {
		out.Body = http.NoBody
	}
	key, ok := g.certificate.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, errors.New("the TLS key does not sign") // cannot be: handshakes use it
	}
	device := &device{Signer: key}
	if err := httpsig.Sign(out, body, device, i.now()); err != nil {
		if device.failed != nil {
			return nil, failed(RuleDevice, device.failed, "the device did not sign the request; the host's log says why")
		}
		return nil, refuse(RuleRequestSignature, "%v", err)
	}
	return out, nil
}

// device tells a failure of the device from that of a request.
type device struct {
	crypto.Signer
	failed error
}

// Sign implements crypto.Signer.
func (d *device) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) (sig []byte, err error) {
	sig, err = d.Signer.Sign(r, digest, o)
	d.failed = err
	return sig, err
}

func drain(req *http.Request) ([]byte, error) {
	if req.Body == nil {
		return nil, nil
	}
	body, err := io.ReadAll(io.LimitReader(req.Body, maxSigned+1))
	if err = errors.Join(err, req.Body.Close()); err != nil {
		return nil, err
	}
	if len(body) > maxSigned {
		return nil, refuse(RuleRequestSignature, "the body of a request that is signed has at most %d bytes", maxSigned)
	}
	return body, nil
}

// carries says why the request does not carry an action of the agent for its body. That
// the action verifies is the receiver's to check.
func carries(req *http.Request, agent string, body []byte) error {
	values := req.Header.Values(httpsig.AgentAction)
	if len(values) != 1 {
		return fmt.Errorf("%d fields %s, exactly one is expected", len(values), httpsig.AgentAction)
	}
	m, err := jws.Split([]byte(values[0]))
	if err != nil {
		return fmt.Errorf("%s: %w", httpsig.AgentAction, err)
	}
	st, err := scope.ParseStatement(m.Payload)
	if err != nil {
		return fmt.Errorf("%s: %w", httpsig.AgentAction, err)
	}
	sum := sha256.Sum256(body)
	switch {
	case st.Agent != agent:
		return fmt.Errorf("the action is of %s, and this is %s", st.Agent, agent)
	case st.Native == nil || st.Native.Format != scope.NativeHTTPBody || st.Native.SHA256 != hex.EncodeToString(sum[:]):
		return errors.New("the action was not signed for this body")
	}
	return nil
}
