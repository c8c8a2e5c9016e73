package gate_test

import (
	"crypto/tls"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"strings"
	"testing"
	"time"

	"inkan/verify"
)

// BenchmarkGate stands beside BenchmarkProxy, which does the same without any
// check of the action: mutual TLS in, HTTP out, connections that stand.
func BenchmarkGate(b *testing.B) {
	s := newSite(b)
	s.config.Receiver.Replay = verify.NewMemoryStore(1<<30, time.Time{})
	s.config.Log = slog.New(slog.DiscardHandler)
	s.serve(b)
	c := s.good(b)
	s.run(b, c)
}

func BenchmarkProxy(b *testing.B) {
	s := newSite(b)
	p := httptest.NewUnstartedServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(s.config.Backend) }})
	server, err := s.config.GetCertificate(nil)
	if err != nil {
		b.Fatal(err)
	}
	p.TLS = &tls.Config{Certificates: []tls.Certificate{*server}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: s.ca.Roots}
	p.EnableHTTP2 = true
	p.StartTLS()
	defer p.Close()
	s.addr = strings.TrimPrefix(p.URL, "https://")
	s.run(b, s.good(b))
}

func (s *site) run(b *testing.B, c *http.Client) {
	for b.Loop() {
		b.StopTimer()
		action := s.sign(b, s.agent, []byte(goodBody), nil)
		b.StartTimer()
		if status, _, answer := s.send(b, c, "POST", "/orders", action, []byte(goodBody), nil); status != 200 {
			b.Fatalf("%d %s", status, answer)
		}
		<-s.got
	}
}
