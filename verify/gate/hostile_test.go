package gate_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net/url"
	"testing"
	"time"

	"inkan/verify"
	"inkan/verify/gate"
)

// TestSlowBodies: an agent whose bodies do not come takes nothing from the others.
func TestSlowBodies(t *testing.T) {
	s := newSite(t)
	s.config.Limits = gate.Limits{ConcurrentVerifications: 4}
	s.serve(t)
	slow := certificate(t, s.ca, func(c *x509.Certificate) {
		c.URIs[0] = &url.URL{Scheme: "spiffe", Host: "example.org", Path: "/agent/slow"}
	})
	for range 8 {
		c, err := tls.Dial("tcp", s.addr, &tls.Config{RootCAs: s.ca.Roots, Certificates: []tls.Certificate{slow}, ServerName: "127.0.0.1"})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := fmt.Fprintf(c, "POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAgent-Action: x\r\nContent-Length: 100\r\n\r\n{"); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(200 * time.Millisecond) // until they are being read
	for range 8 {
		if status, _, answer := s.send(t, s.good(t), "POST", "/orders", s.sign(t, s.agent, []byte(goodBody), nil), []byte(goodBody), nil); status != 200 {
			t.Fatalf("another agent is refused: %d %s", status, answer)
		}
		<-s.got
	}
	// And the slow one has no more than its share.
	c := s.client(t, slow)
	body, w := io.Pipe()
	defer w.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	req := s.request(t, ctx, "POST", "/orders", "x", body)
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != 429 {
		t.Errorf("one slow body more: %s", res.Status)
	}
}

// TestForeignersDoNotCount: what comes with an agent's certificate and is refused for
// that, or for where it comes from, takes nothing of the agent's own rate.
func TestForeignersDoNotCount(t *testing.T) {
	s := newSite(t)
	s.config.Limits = gate.Limits{AgentRequestsPerSecond: 3}
	stolen := certificate(t, s.ca, nil)
	s.config.ClientRevocation = revokedSerial{stolen.Leaf.SerialNumber}
	s.serve(t)
	thief := s.client(t, stolen)
	for range 10 {
		if status, reason, _ := s.send(t, thief, "POST", "/orders", "x", []byte(goodBody), nil); status != 401 || reason != "certificate_revoked" {
			t.Fatalf("a revoked certificate: %d %s", status, reason)
		}
	}
	good := s.good(t)
	if status, _, answer := s.send(t, good, "POST", "/orders", s.sign(t, s.agent, []byte(goodBody), nil), []byte(goodBody), nil); status != 200 {
		t.Errorf("the agent itself: %d %s", status, answer)
	}
	n := 0
	for range 10 {
		if status, reason, _ := s.send(t, good, "POST", "/orders", "x", []byte(goodBody), nil); status == 429 && reason == "rate" {
			n++
		}
	}
	if n == 0 {
		t.Error("the agent's own rate does not hold")
	}
}

// revokedSerial is a list with one certificate on it.
type revokedSerial struct{ serial *big.Int }

func (r revokedSerial) Check(_ context.Context, c, _ *x509.Certificate, _ time.Time) error {
	if c.SerialNumber.Cmp(r.serial) == 0 {
		return &verify.Refusal{Reason: verify.ReasonRevoked, Detail: "revoked"}
	}
	return nil
}
