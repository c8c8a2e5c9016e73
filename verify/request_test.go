package verify_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"inkan/internal/httpsig"
	"inkan/scope"
	"inkan/verify"
)

// TestRequest: a request's Content-Digest and its own signature (RFC 9530, RFC 9421).
func TestRequest(t *testing.T) {
	v := newVenue(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	whose := v.agent.ID
	var unknown error
	lookup := func(_ *http.Request, id string) (crypto.PublicKey, string, error) {
		return &key.PublicKey, whose, unknown
	}
	body := []byte(`{"order":1}`)
	sum := sha256.Sum256(body)
	for _, c := range []struct {
		name    string
		want    *verify.RequestSignature
		digest  string
		sign    bool
		agent   string // whose key it is; "-" is nobody's
		change  func(*http.Request)
		unknown error
		status  int
		reason  string
	}{
		{name: "not looked at", status: 200},
		{name: "a good digest", digest: httpsig.Digest(body), status: 200},
		{name: "a digest of something else", digest: "sha-256=:AAAA:", status: 403, reason: "body"},
		{name: "a digest of an unknown kind", digest: "md5=:AAAA:", status: 403, reason: "body"},
		{name: "not required", want: &verify.RequestSignature{Key: lookup}, status: 200},
		{name: "required", want: &verify.RequestSignature{Key: lookup, Required: true}, status: 401, reason: "request_signature"},
		{name: "required and there", want: &verify.RequestSignature{Key: lookup, Required: true}, sign: true, status: 200},
		{name: "not required, there, and bad", want: &verify.RequestSignature{Key: lookup}, sign: true, change: func(r *http.Request) { r.Header.Set("Signature", "agent=:AAAA:") }, status: 401, reason: "request_signature"},
		{name: "not looked at, and bad", sign: true, change: func(r *http.Request) { r.Header.Set("Signature", "agent=:AAAA:") }, status: 200},
		{name: "malformed", want: &verify.RequestSignature{Key: lookup}, change: func(r *http.Request) { r.Header.Set("Signature-Input", "(") }, status: 401, reason: "request_signature"},
		{name: "another agent's", want: &verify.RequestSignature{Key: lookup}, sign: true, agent: "spiffe://example.org/agent/b", status: 401, reason: "request_signature"},
		{name: "nobody's", want: &verify.RequestSignature{Key: lookup}, sign: true, agent: "-", status: 401, reason: "request_signature"},
		{name: "an unknown key", want: &verify.RequestSignature{Key: lookup}, sign: true, unknown: errors.New("unknown key"), status: 401, reason: "request_signature"},
		{name: "without TLS", want: &verify.RequestSignature{Key: verify.PeerKey}, sign: true, status: 401, reason: "request_signature"},
	} {
		v.config.RequestSignature = c.want
		whose, unknown = v.agent.ID, c.unknown
		switch c.agent {
		case "":
		case "-":
			whose = ""
		default:
			whose = c.agent
		}
		h := v.receiver(t).Middleware(1024, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {}))
		r := httptest.NewRequest(http.MethodPost, "https://venue.example/orders", bytes.NewReader(body))
		r.TLS = nil
		r.Header.Set(verify.Header, v.action(t, func(s *scope.Statement) {
			s.Native = &scope.Native{Format: scope.NativeHTTPBody, SHA256: fmt.Sprintf("%x", sum)}
		}))
		if c.digest != "" {
			r.Header.Set("Content-Digest", c.digest)
		}
		if c.sign {
			if err := httpsig.Sign(r, body, key, time.Now()); err != nil {
				t.Fatal(err)
			}
		}
		if c.change != nil {
			c.change(r)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		var p struct{ Reason string }
		if w.Code != http.StatusOK {
			if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil {
				t.Fatal(err)
			}
		}
		if w.Code != c.status || p.Reason != c.reason {
			t.Errorf("%s: %d %q, want %d %q: %s", c.name, w.Code, p.Reason, c.status, c.reason, w.Body)
		}
	}
	v.config.RequestSignature = &verify.RequestSignature{}
	if _, err := verify.NewReceiver(v.config); err == nil {
		t.Error("a receiver that does not know whose key to take")
	}
}
