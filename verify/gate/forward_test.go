package gate_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"inkan/internal/jws"
	"inkan/scope"
	"inkan/simulator"
	"inkan/verify"
	"inkan/verify/gate"
)

// TestForwards: the backend gets the very body, and is told who acted under
// which scope; over HTTP/1.1 and HTTP/2.
func TestForwards(t *testing.T) {
	for _, protocol := range []string{"HTTP/1.1", "HTTP/2.0"} {
		t.Run(protocol, func(t *testing.T) {
			s := newSite(t)
			s.config.ForwardScope, s.config.ForwardAction, s.config.Headers = true, true, []string{"x-api-version"}
			var kept []string
			s.config.Record = func(_ context.Context, v *verify.Verified, compact string) error {
				s.nothing(t) // it is kept before it is acted on
				kept = append(kept, v.Statement.ID, compact)
				return nil
			}
			s.serve(t)
			c := s.good(t)
			c.Transport.(*http.Transport).ForceAttemptHTTP2 = protocol == "HTTP/2.0"
			var st *scope.Statement
			action := s.sign(t, s.agent, []byte(goodBody), func(x *scope.Statement) { st = x })
			status, _, answer := s.send(t, c, "POST", "/orders", action, []byte(goodBody), func(r *http.Request) { r.Header.Set("X-Api-Version", "7") })
			if status != 200 || answer != "acknowledged" {
				t.Fatalf("%d %s", status, answer)
			}
			got := <-s.got
			if got.Method != "POST" || got.URL.String() != "/orders" || string(got.body) != goodBody {
				t.Errorf("the backend got %s %s %q", got.Method, got.URL, got.body)
			}
			certificate, hash := sha256.Sum256(s.agent.Chain[0].Raw), s.scope.Hash()
			for name, want := range map[string]string{
				gate.HeaderAgent:       s.agent.ID,
				gate.HeaderActionID:    st.ID,
				gate.HeaderKind:        "order.new",
				gate.HeaderCounter:     "1",
				gate.HeaderCertificate: hex.EncodeToString(certificate[:]),
				gate.HeaderScopeHash:   hex.EncodeToString(hash[:]),
				gate.HeaderScope:       base64.RawURLEncoding.EncodeToString(s.scope.Canonical()),
				verify.Header:          action,
				"X-Forwarded-For":      "127.0.0.1",
				"X-Forwarded-Proto":    "https",
				"X-Api-Version":        "7",
				"Content-Type":         "application/json",
			} {
				if v := got.Header.Values(name); len(v) != 1 || v[0] != want {
					t.Errorf("%s is %q, want %q", name, v, want)
				}
			}
			if !slices.Equal(kept, []string{st.ID, action}) {
				t.Errorf("kept %q", kept)
			}
			if log := s.log.String(); !strings.Contains(log, "msg=forwarded") || !strings.Contains(log, s.agent.ID) {
				t.Errorf("the log does not say so: %s", log)
			}
		})
	}
}

// TestCancel: a field that stands in the path.
func TestCancel(t *testing.T) {
	s := newSite(t)
	s.serve(t)
	if status, _, answer := s.send(t, s.good(t), "DELETE", "/orders/A-1", s.sign(t, s.agent, nil, cancelOf("A-1")), nil, nil); status != 200 {
		t.Fatalf("%d %s", status, answer)
	}
	if got := <-s.got; got.Method != "DELETE" || got.URL.Path != "/orders/A-1" || len(got.body) != 0 || got.Header.Get(gate.HeaderKind) != "order.cancel" {
		t.Errorf("the backend got %s %s %q", got.Method, got.URL, got.body)
	}
}

// TestForgedHeaders speaks HTTP by hand: nothing of what a client says about
// identity reaches the backend, however it is spelled or carried.
func TestForgedHeaders(t *testing.T) {
	s := newSite(t)
	s.serve(t)
	forged := []string{
		"Agent-Id: spiffe://example.org/agent/evil",
		"agent-id: spiffe://example.org/agent/evil",
		"Agent_Id: spiffe://example.org/agent/evil",
		"AGENT_ID: spiffe://example.org/agent/evil",
		"Agent.Id: spiffe://example.org/agent/evil",
		"Agent-Scope: evil",
		"Agent-Scope-Sha256: evil",
		"Agent-Action-Id: evil",
		"Agent-Evil: evil",
		"X-Forwarded-For: 192.0.2.66",
		"X_Forwarded_For: 192.0.2.66",
		"Forwarded: for=192.0.2.66",
		"X-Real-IP: 192.0.2.66",
		"X-HTTP-Method-Override: DELETE",
		"X-Original-URL: /admin",
		"Cookie: evil=1",
		"Authorization: Basic ZXZpbA==",
		// Named as hop-by-hop, so that a careless proxy drops what it had set itself.
		"Connection: Agent-Id, Agent-Scope-Sha256, X-Forwarded-For, Upgrade",
		"Upgrade: websocket",
		"TE: trailers",
		"Expect: 100-continue",
	}
	answer := s.raw(t, "POST /orders HTTP/1.1\r\nHost: evil.example\r\nContent-Type: application/json\r\n"+strings.Join(forged, "\r\n")+
		"\r\nAgent-Action: "+s.sign(t, s.agent, []byte(goodBody), nil)+fmt.Sprintf("\r\nContent-Length: %d\r\n\r\n%s", len(goodBody), goodBody))
	if !strings.Contains(answer, "200 OK") {
		t.Fatalf("answer %q", answer)
	}
	got := <-s.got
	want := []string{"Agent-Action-Counter", "Agent-Action-Id", "Agent-Action-Kind", "Agent-Certificate-Sha256", "Agent-Id", "Agent-Scope-Sha256", "Content-Length", "Content-Type", "X-Forwarded-For", "X-Forwarded-Proto"}
	if names := slices.Sorted(maps.Keys(got.Header)); !slices.Equal(names, want) {
		t.Errorf("the backend got the headers %q, want %q", names, want)
	}
	for name, values := range got.Header {
		if text := strings.Join(values, " "); strings.Contains(text, "evil") || strings.Contains(text, "192.0.2.66") || len(values) != 1 {
			t.Errorf("%s is %q", name, values)
		}
	}
	if got.Header.Get(gate.HeaderAgent) != s.agent.ID {
		t.Errorf("the backend was told %q", got.Header.Get(gate.HeaderAgent))
	}
	if strings.Contains(got.Host, "evil") {
		t.Errorf("Host is %q", got.Host)
	}
}

// TestChunkedAndTrailers: chunks arrive as the bytes that were signed; trailers
// are dropped, since they can carry headers past any check.
func TestChunkedAndTrailers(t *testing.T) {
	s := newSite(t)
	s.serve(t)
	body := fmt.Sprintf("%x\r\n%s\r\n%x\r\n%s\r\n0\r\nAgent-Id: evil\r\n\r\n", 10, goodBody[:10], len(goodBody)-10, goodBody[10:])
	answer := s.raw(t, "POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTrailer: Agent-Id\r\nTransfer-Encoding: chunked\r\nAgent-Action: "+s.sign(t, s.agent, []byte(goodBody), nil)+"\r\n\r\n"+body)
	if !strings.Contains(answer, "200 OK") {
		t.Fatalf("answer %q", answer)
	}
	got := <-s.got
	if string(got.body) != goodBody || len(got.TransferEncoding) != 0 || len(got.Trailer) != 0 || got.ContentLength != int64(len(goodBody)) {
		t.Errorf("the backend got %q, length %d, coding %q, trailer %q", got.body, got.ContentLength, got.TransferEncoding, got.Trailer)
	}
}

// TestBackendOverTLS: a backend that speaks HTTP/2, below a path of its own, and
// asks the gate for a certificate. HTTP/2 would carry trailers.
func TestBackendOverTLS(t *testing.T) {
	s := newSite(t)
	backend := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		b, err := io.ReadAll(req.Body)
		if err != nil {
			t.Errorf("the backend reads: %v", err)
		}
		s.got <- request{req, b}
	}))
	backend.EnableHTTP2 = true
	backend.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: s.ca.Roots}
	backend.StartTLS()
	defer backend.Close()
	tr := backend.Client().Transport.(*http.Transport)
	tr.TLSClientConfig.Certificates = []tls.Certificate{certificate(t, s.ca, nil)}
	s.config.Transport = tr
	var err error
	if s.config.Backend, err = url.Parse(backend.URL + "/base"); err != nil {
		t.Fatal(err)
	}
	s.serve(t)
	body := fmt.Sprintf("%x\r\n%s\r\n0\r\nAgent-Id: evil\r\n\r\n", len(goodBody), goodBody)
	answer := s.raw(t, "POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTrailer: Agent-Id\r\nTransfer-Encoding: chunked\r\nAgent-Action: "+s.sign(t, s.agent, []byte(goodBody), nil)+"\r\n\r\n"+body)
	if !strings.Contains(answer, "200 OK") {
		t.Fatalf("answer %q", answer)
	}
	got := <-s.got
	if got.Proto != "HTTP/2.0" || got.URL.Path != "/base/orders" || string(got.body) != goodBody || len(got.Trailer) != 0 || got.Header.Get(gate.HeaderAgent) != s.agent.ID {
		t.Errorf("the backend got %s %s %q, trailer %q, headers %q", got.Proto, got.URL, got.body, got.Trailer, got.Header)
	}
}

// TestSmuggling: requests with two readings are refused before any check.
func TestSmuggling(t *testing.T) {
	s := newSite(t)
	s.serve(t)
	head := "POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAgent-Action: " + s.sign(t, s.agent, []byte(goodBody), nil)
	for name, text := range map[string]string{
		"two lengths":         head + "\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n" + goodBody,
		"an unknown coding":   head + "\r\nTransfer-Encoding: xchunked\r\n\r\n" + goodBody,
		"a space before :":    head + "\r\nContent-Length : 5\r\n\r\n" + goodBody,
		"absolute form":       strings.Replace(head, "/orders", "http://elsewhere/orders", 1) + fmt.Sprintf("\r\nContent-Length: %d\r\n\r\n%s", len(goodBody), goodBody),
		"a header too large":  head + "\r\nX: " + strings.Repeat("a", 200<<10) + "\r\n\r\n",
		"no host":             strings.Replace(head, "Host: x\r\n", "", 1) + "\r\nContent-Length: 0\r\n\r\n",
		"a control character": head + "\r\nX: a\x00b\r\n\r\n",
	} {
		if answer := s.raw(t, text); !strings.HasPrefix(answer, "HTTP/1.1 4") && !strings.HasPrefix(answer, "HTTP/1.1 501") {
			t.Errorf("%s: answer %q", name, answer)
		}
		s.nothing(t)
	}
}

// TestLargestAction: the server's bound on headers has room for the largest JWS.
func TestLargestAction(t *testing.T) {
	s := newSite(t)
	s.serve(t)
	status, reason, _ := s.send(t, s.good(t), "POST", "/orders", strings.Repeat("A", jws.MaxCompact), []byte(goodBody), nil)
	if status != 400 || reason != "form" {
		t.Errorf("%d %s: the receiver did not see it", status, reason)
	}
}

// raw sends text over TLS and returns the beginning of the answer.
func (s *site) raw(t *testing.T, text string) string {
	t.Helper()
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 5 * time.Second}, Config: &tls.Config{RootCAs: s.ca.Roots, Certificates: []tls.Certificate{certificate(t, s.ca, nil)}}}
	conn, err := d.DialContext(t.Context(), "tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.WriteString(conn, text) }() // the gate may stop reading
	r := bufio.NewReader(conn)
	for {
		line, err := r.ReadString('\n')
		if err != nil || !strings.HasPrefix(line, "HTTP/1.1 100") {
			return line
		}
		if _, err := r.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBackendAnswers: errors, redirects and codings of the backend come through
// as they are.
func TestBackendAnswers(t *testing.T) {
	s := newSite(t)
	s.answer = func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", "/elsewhere")
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(http.StatusTemporaryRedirect)
		fmt.Fprint(w, `{"reason":"replay"}`)
	}
	s.serve(t)
	c := s.good(t)
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	if status, _, answer := s.send(t, c, "POST", "/orders", s.sign(t, s.agent, []byte(goodBody), nil), []byte(goodBody), nil); status != 307 || answer != `{"reason":"replay"}` {
		t.Errorf("%d %s", status, answer)
	}
	if log := s.log.String(); strings.Contains(log, "msg=refused") {
		t.Errorf("the backend's words were taken for the gate's: %s", log)
	}
}

// TestBackendSwitchesProtocols: no way past the gate for what follows.
func TestBackendSwitchesProtocols(t *testing.T) {
	s := newSite(t)
	s.answer = func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Connection", "Upgrade")
		w.Header().Set("Upgrade", "websocket")
		w.WriteHeader(http.StatusSwitchingProtocols)
	}
	s.serve(t)
	if status, reason, _ := s.send(t, s.good(t), "POST", "/orders", s.sign(t, s.agent, []byte(goodBody), nil), []byte(goodBody), nil); status != 502 || reason != "backend" {
		t.Errorf("%d %s", status, reason)
	}
}

// TestBackendFails: the agent learns whether its action may have been acted on.
func TestBackendFails(t *testing.T) {
	t.Run("is not there", func(t *testing.T) {
		s := newSite(t)
		u := *s.config.Backend
		u.Host, s.config.Backend = simulator.FreePortForTest(t), &u
		s.serve(t)
		status, reason, answer := s.send(t, s.good(t), "POST", "/orders", s.sign(t, s.agent, []byte(goodBody), nil), []byte(goodBody), nil)
		if status != 502 || reason != "backend" || !strings.Contains(answer, "did not get the action") {
			t.Errorf("%d %s %s", status, reason, answer)
		}
	})
	t.Run("hangs up", func(t *testing.T) {
		s := newSite(t)
		s.answer = func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
		s.serve(t)
		status, reason, answer := s.send(t, s.good(t), "POST", "/orders", s.sign(t, s.agent, []byte(goodBody), nil), []byte(goodBody), nil)
		if status != 502 || reason != "backend" || !strings.Contains(answer, "is not known") {
			t.Errorf("%d %s %s", status, reason, answer)
		}
		if <-s.got; len(s.got) != 0 {
			t.Error("the order was sent again")
		}
	})
	t.Run("does not answer in time", func(t *testing.T) {
		s := newSite(t)
		s.config.BackendTimeout = 100 * time.Millisecond
		s.answer = func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
		s.serve(t)
		if status, reason, _ := s.send(t, s.good(t), "POST", "/orders", s.sign(t, s.agent, []byte(goodBody), nil), []byte(goodBody), nil); status != 502 || reason != "backend" {
			t.Errorf("%d %s", status, reason)
		}
	})
}

// TestClientLeaves: an action that was accepted is acted on to its end.
func TestClientLeaves(t *testing.T) {
	s := newSite(t)
	left, result := make(chan struct{}), make(chan error, 1)
	s.answer = func(_ http.ResponseWriter, r *http.Request) {
		<-left
		select {
		case <-r.Context().Done():
			result <- r.Context().Err()
		case <-time.After(300 * time.Millisecond): // long enough for a cancellation to arrive
			result <- nil
		}
	}
	s.serve(t)
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+s.addr+"/orders", bytes.NewReader([]byte(goodBody)))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set(verify.Header, s.sign(t, s.agent, []byte(goodBody), nil))
	go func() {
		<-s.got
		cancel()
		close(left)
	}()
	if res, err := s.good(t).Do(req); err == nil {
		_ = res.Body.Close()
		t.Fatal("the client did not leave")
	}
	if err := <-result; err != nil {
		t.Errorf("the backend's request was given up: %v", err)
	}
}
