package proxy_test

import (
	"crypto"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"inkan/internal/httpsig"
	"inkan/scope"
)

// action is a JWS whose statement is an agent's for a body. The proxy does not
// verify it: the venue does.
func action(t *testing.T, agent string, body []byte) string {
	t.Helper()
	now := time.Now().UTC().Truncate(time.Microsecond)
	st := &scope.Statement{Version: 1, Issuer: "CN=x", Agent: agent, Audience: "XPAR", ID: "AAECAwQFBgcICQoLDA0ODw", Counter: 1, Time: scope.Timestamp{Time: now}, Expires: now.Add(time.Minute).Unix(), Kind: scope.OrderCancel, Order: &scope.Order{ClOrdID: "C", OrigClOrdID: "A"},
		Native: &scope.Native{Format: scope.NativeHTTPBody, SHA256: fmt.Sprintf("%x", sha256.Sum256(body))}, Decision: scope.Decision{Decision: scope.DecisionPermit}, Attestation: scope.Attestation{Evidence: "00", Time: scope.Timestamp{Time: now}}}
	b, err := st.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	e := base64.RawURLEncoding.EncodeToString
	return e([]byte("{}")) + "." + e(b) + "." + e([]byte("x"))
}

// TestSignRequests: with sign_requests the proxy signs what carries the agent's
// action, over the very request that the server gets, and leaves the rest alone.
func TestSignRequests(t *testing.T) {
	b := newBench(t)
	b.server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		key := r.TLS.PeerCertificates[0].PublicKey
		if !httpsig.Present(r) {
			fmt.Fprint(w, "unsigned")
		} else if err := httpsig.Verify(r, body, func(string) (crypto.PublicKey, error) { return key, nil }, time.Now(), time.Second); err != nil {
			fmt.Fprint(w, err)
		} else {
			fmt.Fprint(w, "verified")
		}
	})
	const id = "spiffe://example.org/agent/a"
	body := []byte("{\"cancel\": 1}\r\n")
	for sign, want := range map[string]string{"true": "verified", "false": "unsigned"} {
		r := b.start(t, fmt.Sprintf("{listen: \"127.0.0.1:0\", protocol: http, upstream: %q, sign_requests: %s, callers: [{user: %s}]}", b.server.Listener.Addr(), sign, me()))
		c := r.client(false)
		for _, url := range []string{"/orders", "/orders/a%2Fb?x=1;y&z"} {
			if _, said := do(t, c, http.MethodPost, "http://"+r.at+url, body, http.Header{"Agent-Action": {action(t, id, body)}}); string(said) != want {
				t.Errorf("sign_requests %s, %s: %s, want %s", sign, url, said, want)
			}
		}
		if _, said := do(t, c, http.MethodPost, "http://"+r.at+"/orders", body, nil); string(said) != "unsigned" {
			t.Errorf("a request without an action: %s", said)
		}
		if sign == "false" {
			continue
		}
		for name, h := range map[string]http.Header{
			"another agent's action": {"Agent-Action": {action(t, id+"b", body)}}, "another body's": {"Agent-Action": {action(t, id, nil)}}, "two": {"Agent-Action": {action(t, id, body), action(t, id, body)}},
			"a signature that is there": {"Agent-Action": {action(t, id, body)}, "Signature": {"agent=:AAAA:"}},
		} {
			res, said := do(t, c, http.MethodPost, "http://"+r.at+"/orders", body, h)
			if res.StatusCode != http.StatusBadRequest || !strings.Contains(string(said), `"rule":"request_signature"`) {
				t.Errorf("%s: %s %s", name, res.Status, said)
			}
		}
	}
}
