package gate_test

import (
	"context"
	"crypto/x509"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"inkan/scope"
	"inkan/verify"
	"inkan/verify/gate"
)

var errInside = errors.New("planted: postgres://gate@10.1.2.3/venue: /etc/inkan/db.pass")

type broken struct{}

func (broken) Use(context.Context, verify.Use, time.Time) error                    { return errInside }
func (broken) Policy(context.Context, scope.Digest) (string, error)                { return "", errInside }
func (broken) RoundTrip(*http.Request) (*http.Response, error)                     { return nil, errInside }
func brokenRecord(context.Context, *verify.Verified, string) error                 { return errInside }
func notKnown(context.Context, string, string, *x509.Certificate, time.Time) error { return errInside }

type kills func(context.Context, string, string, *x509.Certificate, time.Time) error

func (k kills) Check(ctx context.Context, agent, venue string, issuer *x509.Certificate, now time.Time) error {
	return k(ctx, agent, venue, issuer, now)
}

// TestInsideStaysInside: what went wrong inside the gate is in its log and, where it
// is the gate's own trouble, in its health; the client gets the reason and what to do.
func TestInsideStaysInside(t *testing.T) {
	for _, c := range []struct {
		name, reason string
		own          bool
		change       func(*gate.Config)
		of           func(*scope.Statement)
	}{
		{"revocation of the TLS certificate", "revocation_unknown", true, func(c *gate.Config) { c.ClientRevocation = revokes{errInside} }, nil},
		{"revocation of the action's certificate", "revocation_unknown", true, func(c *gate.Config) {
			c.Receiver.Revocation, c.ClientRevocation = revokes{errInside}, verify.NoRevocation{}
		}, nil},
		{"kill list", "kill_state_unknown", true, func(c *gate.Config) { c.Receiver.Kills = kills(notKnown) }, nil},
		{"store", "replay_store", true, func(c *gate.Config) { c.Receiver.Replay = broken{} }, nil},
		{"policies", "policy", false, func(c *gate.Config) { c.Receiver.Policies = broken{} }, func(s *scope.Statement) { s.Decision.Policy = &scope.Digest{1} }},
		{"record", "record", true, func(c *gate.Config) { c.Record = brokenRecord }, nil},
		{"backend", "backend", true, func(c *gate.Config) { c.Transport = broken{} }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSite(t)
			c.change(&s.config)
			g := s.serve(t)
			_, reason, answer := s.send(t, s.good(t), "POST", "/orders", s.sign(t, s.agent, []byte(goodBody), c.of), []byte(goodBody), nil)
			if reason != c.reason || strings.Contains(answer, "planted") || !strings.Contains(answer, "detail") {
				t.Errorf("the client got %s", answer)
			}
			deadline := time.Now().Add(10 * time.Second)
			for !strings.Contains(s.log.String(), "reason="+c.reason) && time.Now().Before(deadline) { // it is written after the answer
				time.Sleep(5 * time.Millisecond)
			}
			if log := s.log.String(); !strings.Contains(log, "reason="+c.reason) || !strings.Contains(log, "planted") {
				t.Errorf("the log has %s", log)
			}
			w := httptest.NewRecorder()
			g.Observability().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/healthz", nil))
			if c.own != (w.Code == http.StatusServiceUnavailable && strings.Contains(w.Body.String(), "planted")) {
				t.Errorf("health: %d %s", w.Code, w.Body)
			}
			w = httptest.NewRecorder()
			g.Observability().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
			if !strings.Contains(w.Body.String(), `inkan_gate_refused_total{reason="`+c.reason+`"} 1`) {
				t.Errorf("metrics: %s", w.Body)
			}
		})
	}
}
