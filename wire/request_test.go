package wire_test

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"inkan/internal/jws"
	"inkan/internal/testca"
	"inkan/scope"
	"inkan/verify"
	"inkan/wire"
)

// signedFor signs a cancel for a body, as a signer does.
func signedFor(t *testing.T, a *testca.Agent, sc, id string, body []byte) string {
	t.Helper()
	s, err := scope.ParseCanonical([]byte(sc))
	if err != nil {
		t.Fatal(err)
	}
	action, err := scope.ParseAction(fmt.Appendf(nil, `{"id":%q,"aud":"XPAR","act":"order.cancel","ord":{"ClOrdID":"C","OrigClOrdID":"A"},"native":{"fmt":"http-body","sha-256":"%x"}}`, id, sha256.Sum256(body)))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().UTC().Truncate(time.Microsecond)
	st := &scope.Statement{Version: 1, Issuer: "CN=Test CA", Agent: a.ID, Audience: "XPAR", ID: action.ID, Counter: 1, Time: scope.Timestamp{Time: now}, Expires: now.Add(30 * time.Second).Unix(), Kind: action.Kind, Order: action.Order, Native: action.Native,
		Decision: scope.Decision{Decision: scope.DecisionPermit, Certificate: sha256.Sum256(a.Chain[0].Raw), Scope: s.Hash()}, Attestation: scope.Attestation{Evidence: "00", Time: scope.Timestamp{Time: now.Truncate(time.Second)}}}
	b, err := st.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	h, err := jws.NewHeader("ES256", a.Chain, true)
	if err != nil {
		t.Fatal(err)
	}
	input := h.SigningInput(b)
	sig, err := jws.Sign(a.Key, input)
	if err != nil {
		t.Fatal(err)
	}
	return jws.Compact(input, sig)
}

// TestSignedRequests: the device signs a request that carries the agent's action,
// as it is sent, and a venue's middleware verifies that beside the action.
func TestSignedRequests(t *testing.T) {
	for _, device := range []string{"tpm", "token"} {
		t.Run(device, func(t *testing.T) {
			h := newHost(t, device)
			sc := fmt.Sprintf(hostScope, h.port)
			agent := h.ca.State(t, h.dir, "a", []byte(sc), h.key, h.policy)
			other := h.ca.Agent(t, "b", []byte(sc), nil)
			var spoil func(*http.Request) // between the agent and the venue
			receiver, err := verify.NewReceiver(verify.Config{Audiences: []string{"XPAR"}, Roots: h.ca.Roots, Revocation: verify.NoRevocation{}, Replay: verify.NewMemoryStore(100, time.Now().Add(-time.Hour)),
				RequestSignature: &verify.RequestSignature{Required: true, Key: verify.PeerKey}})
			if err != nil {
				t.Fatal(err)
			}
			checked := receiver.Middleware(1<<20, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				v, _ := verify.FromContext(r.Context())
				fmt.Fprint(w, v.Agent)
			}))
			h.server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if spoil != nil {
					spoil(r)
				}
				checked.ServeHTTP(w, r)
			})
			transport := open(t, h.options).Dialer(h.ca.Roots).Transport(4)
			transport.SignRequests = true
			send := func(path, action, body string, change func(*http.Request)) (string, error) {
				req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, fmt.Sprintf("https://127.0.0.1:%d%s", h.port, path), strings.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				if action != "" {
					req.Header.Set("Agent-Action", action)
				}
				if change != nil {
					change(req)
				}
				res, err := transport.RoundTrip(req)
				if err != nil {
					return "", err
				}
				defer res.Body.Close()
				b, err := io.ReadAll(res.Body)
				if res.StatusCode == http.StatusOK {
					return string(b), err
				}
				var p struct{ Reason string }
				return p.Reason, errors.Join(err, json.Unmarshal(b, &p), fmt.Errorf("%d %s", res.StatusCode, p.Reason))
			}
			one := signedFor(t, agent, sc, "AAECAwQFBgcICQoLDA0ODw", []byte("cancel"))
			for name, change := range map[string]func(*http.Request){
				"another path":     func(r *http.Request) { r.URL.Path = "/other" },
				"another method":   func(r *http.Request) { r.Method = http.MethodPut },
				"no signature":     func(r *http.Request) { r.Header.Del("Signature"); r.Header.Del("Signature-Input") },
				"half a signature": func(r *http.Request) { r.Header.Del("Signature") },
				"another's action": func(r *http.Request) {
					r.Header.Set("Agent-Action", signedFor(t, other, sc, "AQECAwQFBgcICQoLDA0ODw", []byte("cancel")))
				},
			} {
				spoil = change
				if _, err := send("/orders", one, "cancel", nil); err == nil || !strings.Contains(err.Error(), "401 request_signature") {
					t.Errorf("%s: %v", name, err)
				}
			}
			spoil = func(r *http.Request) { r.Header.Set("Content-Digest", "sha-256=:AAAA:") }
			if _, err := send("/orders", one, "cancel", nil); err == nil || !strings.Contains(err.Error(), "403 body") {
				t.Errorf("another digest: %v", err)
			}
			spoil = nil
			if said, err := send("/orders?at=once", one, "cancel", nil); err != nil || said != agent.ID {
				t.Errorf("a good request: %s, %v", said, err)
			}
			if _, err := send("/orders", one, "cancel", nil); err == nil || !strings.Contains(err.Error(), "409 replay") {
				t.Errorf("the same again, signed anew: %v", err)
			}
			if _, err := send("/orders", "", "cancel", nil); err == nil || !strings.Contains(err.Error(), "400 form") {
				t.Errorf("a request without an action: %v", err)
			}
			// What is not the agent's, or not for this body, the device does not sign.
			for name, c := range map[string]struct {
				action, body string
				change       func(*http.Request)
			}{
				"another's action":   {signedFor(t, other, sc, "AAECAwQFBgcICQoLDA0ODw", []byte("cancel")), "cancel", nil},
				"another body":       {one, "cancel all", nil},
				"not an action":      {"a.b.c", "cancel", nil},
				"no JWS":             {"a", "cancel", nil},
				"two actions":        {one, "cancel", func(r *http.Request) { r.Header.Add("Agent-Action", one) }},
				"a large body":       {one, strings.Repeat("x", 1<<20+1), nil},
				"signed already":     {one, "cancel", func(r *http.Request) { r.Header.Set("Signature", "agent=:AAAA:") }},
				"a digest that lies": {one, "cancel", func(r *http.Request) { r.Header.Set("Content-Digest", "sha-256=:AAAA:") }},
			} {
				if _, err := send("/orders", c.action, c.body, c.change); !errors.Is(err, &scope.Refusal{Rule: wire.RuleRequestSignature}) {
					t.Errorf("%s: %v", name, err)
				}
			}
		})
	}
}
