package verify_test

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"inkan/scope"
	"inkan/verify"
	"inkan/verify/source"
)

// errInside is an error as a database or a loader has it.
var errInside = errors.New("planted: postgres://gate@10.1.2.3/venue: /etc/inkan/db.pass: connection refused")

// broken is every part of a receiver that can fail for a reason of its own.
type broken struct{}

func (broken) Use(context.Context, verify.Use, time.Time) error { return errInside }
func (broken) Lookup(netip.Addr) ([]string, error)              { return nil, errInside }
func (broken) Policy(context.Context, scope.Digest) (string, error) {
	return "", errInside
}

type brokenRevocation struct{}

func (brokenRevocation) Check(context.Context, *x509.Certificate, *x509.Certificate, time.Time) error {
	return errInside
}

type brokenKills struct{}

func (brokenKills) Check(context.Context, string, string, *x509.Certificate, time.Time) error {
	return errInside
}

// TestInsideStaysInside: what went wrong inside a receiver is in the refusal's
// cause, and so for its log; neither the client nor the refusal's text has it.
func TestInsideStaysInside(t *testing.T) {
	body := []byte(`{"qty":100}`)
	sum := sha256.Sum256(body)
	for _, c := range []struct {
		reason verify.Reason
		status int
		change func(t *testing.T, v *venue)
		of     func(*scope.Statement)
		hidden string // what else is not told
	}{
		{reason: verify.ReasonRevocation, status: 503, change: func(_ *testing.T, v *venue) { v.config.Revocation = brokenRevocation{} }},
		{reason: verify.ReasonRevocation, status: 503, change: func(_ *testing.T, v *venue) {
			v.config.Revocation = &verify.CRL{MaxAge: time.Hour, Load: func(context.Context) ([]byte, error) { return nil, errInside }}
		}},
		{reason: verify.ReasonKillState, status: 503, change: func(_ *testing.T, v *venue) { v.config.Kills = brokenKills{} }},
		{reason: verify.ReasonStore, status: 503, change: func(_ *testing.T, v *venue) { v.config.Replay = broken{} }},
		{reason: verify.ReasonPolicy, status: 403, change: func(_ *testing.T, v *venue) { v.config.Policies = broken{} }, of: func(s *scope.Statement) { s.Decision.Policy = &scope.Digest{1} }},
		{reason: verify.ReasonSourceRegion, status: 403, change: func(t *testing.T, v *venue) {
			v.rescope(t, `"source_regions":["FR"]`)
			v.config.Regions = broken{}
		}},
		{reason: verify.ReasonSourceNetwork, status: 403, hidden: "127.0.0.1", change: func(_ *testing.T, v *venue) {
			v.config.Forwarding = &source.Forwarding{Header: source.HeaderForwardedFor, Networks: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}
		}},
		{reason: verify.ReasonRequestSignature, status: 401, change: func(_ *testing.T, v *venue) {
			v.config.RequestSignature = &verify.RequestSignature{Key: func(*http.Request, string) (crypto.PublicKey, string, error) { return nil, "", errInside }}
		}},
	} {
		t.Run(string(c.reason), func(t *testing.T) {
			v := newVenue(t)
			c.change(t, v)
			var logged []error
			v.config.Refused = func(_ *http.Request, err error) { logged = append(logged, err) }
			srv := httptest.NewServer(v.receiver(t).Middleware(1024, http.NotFoundHandler()))
			defer srv.Close()
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, srv.URL, strings.NewReader(string(body)))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set(verify.Header, v.action(t, func(s *scope.Statement) {
				s.Native = &scope.Native{Format: scope.NativeHTTPBody, SHA256: hex.EncodeToString(sum[:])}
				if c.of != nil {
					c.of(s)
				}
			}))
			if c.reason == verify.ReasonRequestSignature {
				now := time.Now().Unix()
				req.Header.Set("Signature-Input", fmt.Sprintf(`agent=("@method" "@authority" "@path" "content-digest" "agent-action");created=%d;expires=%d;keyid="k";alg="ed25519";nonce="n";tag="web-bot-auth"`, now, now+60))
				req.Header.Set("Signature", "agent=:AAAA:")
			}
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			answer, err := io.ReadAll(res.Body)
			if err != nil {
				t.Fatal(err)
			}
			if res.StatusCode != c.status || !strings.Contains(string(answer), string(c.reason)) {
				t.Errorf("%d %s", res.StatusCode, answer)
			}
			if len(logged) != 1 {
				t.Fatalf("told of %d refusals: %v", len(logged), logged)
			}
			for _, text := range []string{string(answer), logged[0].Error()} {
				if strings.Contains(text, "planted") || c.hidden != "" && strings.Contains(text, c.hidden) {
					t.Errorf("what is inside was told: %s", text)
				}
			}
			refusal, ok := errors.AsType[*verify.Refusal](logged[0])
			if !ok || refusal.Reason != c.reason || refusal.Cause == nil || c.hidden == "" && !errors.Is(refusal, errInside) {
				t.Errorf("for the log there is %#v", logged[0])
			}
		})
	}
}
