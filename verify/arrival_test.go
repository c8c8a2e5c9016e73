package verify_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"inkan/internal/problem"
	"inkan/scope"
	"inkan/verify"
	"inkan/verify/source"
)

// rescope gives the agent a certificate whose scope has more members, in JSON.
func (v *venue) rescope(t testing.TB, members string) {
	t.Helper()
	text := scopeJSON
	if strings.Contains(members, "allowed_actions") {
		text = strings.Replace(text, `"allowed_actions":["order.new"],`, "", 1)
	}
	s, err := scope.Parse([]byte(strings.Replace(text, `{`, `{`+members+`,`, 1)))
	if err != nil {
		t.Fatal(err)
	}
	v.scope = s
	v.agent = v.ca.Agent(t, "a", s.Canonical(), nil)
}

// send posts an order for a body from a local address and returns the status
// and what a problem document says.
func (v *venue) send(t *testing.T, local, url string, fields ...string) (int, *problem.Problem) {
	t.Helper()
	const body = `{"qty":100}`
	sum := sha256.Sum256([]byte(body))
	compact := v.action(t, func(s *scope.Statement) {
		s.Native = &scope.Native{Format: scope.NativeHTTPBody, SHA256: hex.EncodeToString(sum[:])}
	})
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set(verify.Header, compact)
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ": ")
		req.Header.Add(name, value)
	}
	d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(local)}}
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		return d.DialContext(ctx, network, address)
	}}}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, problem.Parse(res.StatusCode, res.Header.Get("Content-Type"), b)
}

// TestSource sends good orders over real connections from several addresses.
func TestSource(t *testing.T) {
	feed := filepath.Join(t.TempDir(), "regions.csv")
	if err := os.WriteFile(feed, []byte("127.0.0.2,FR,FR-IDF,,\n127.0.0.3,US,,,\n::1,FR,,,\n192.0.2.0/24,FR,,,\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	regions, err := source.Open(feed)
	if err != nil {
		t.Fatal(err)
	}
	proxy := &source.Forwarding{Header: source.HeaderForwarded, Networks: []netip.Prefix{netip.MustParsePrefix("127.0.0.9/32")}}
	for _, c := range []struct {
		name, members, local string
		config               func(*verify.Config)
		fields               []string
		reason               verify.Reason
	}{
		{"network", `"source_networks":["127.0.0.2/32"]`, "127.0.0.2", nil, nil, ""},
		{"another address of the host", `"source_networks":["127.0.0.2/32"]`, "127.0.0.3", nil, nil, verify.ReasonSourceNetwork},
		{"IPv6", `"source_networks":["::1/128"]`, "::1", nil, nil, ""},
		{"IPv6 from elsewhere", `"source_networks":["2001:db8::/32"]`, "::1", nil, nil, verify.ReasonSourceNetwork},
		{"all of IPv6, from IPv4", `"source_networks":["::/0"]`, "127.0.0.2", nil, nil, verify.ReasonSourceNetwork},
		{"region", `"source_regions":["FR"]`, "127.0.0.2", func(c *verify.Config) { c.Regions = regions }, nil, ""},
		{"another region", `"source_regions":["FR"]`, "127.0.0.3", func(c *verify.Config) { c.Regions = regions }, nil, verify.ReasonSourceRegion},
		{"region not known", `"source_regions":["FR"]`, "127.0.0.4", func(c *verify.Config) { c.Regions = regions }, nil, verify.ReasonSourceRegion},
		{"no region data", `"source_regions":["FR"]`, "127.0.0.2", nil, nil, verify.ReasonSourceRegion},
		{"header without a proxy", `"source_networks":["192.0.2.0/24"]`, "127.0.0.2", nil, []string{"Forwarded: for=192.0.2.1", "X-Forwarded-For: 192.0.2.1"}, verify.ReasonSourceNetwork},
		{"header not of the proxy", `"source_networks":["192.0.2.0/24"]`, "127.0.0.2", func(c *verify.Config) { c.Forwarding = proxy }, []string{"Forwarded: for=192.0.2.1"}, verify.ReasonSourceNetwork},
		{"proxy", `"source_networks":["192.0.2.0/24"],"source_regions":["FR"]`, "127.0.0.9", func(c *verify.Config) { c.Forwarding, c.Regions = proxy, regions }, []string{"Forwarded: for=192.0.2.1"}, ""},
		{"the proxy's own address", `"source_networks":["127.0.0.9/32"]`, "127.0.0.9", func(c *verify.Config) { c.Forwarding = proxy }, []string{"Forwarded: for=192.0.2.1"}, verify.ReasonSourceNetwork},
		{"proxy that says two things", `"allow_short":false`, "127.0.0.9", func(c *verify.Config) { c.Forwarding = proxy }, []string{"Forwarded: for=192.0.2.1", "Forwarded: for=192.0.2.2"}, verify.ReasonSourceNetwork},
		{"no place in the scope", `"allow_short":false`, "127.0.0.3", nil, nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := newVenue(t)
			v.rescope(t, c.members)
			if c.config != nil {
				c.config(&v.config)
			}
			s := httptest.NewUnstartedServer(v.receiver(t).Middleware(1000, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})))
			if strings.Contains(c.local, ":") {
				l, err := net.Listen("tcp", "[::]:0") // both families, so IPv4 would arrive as IPv6
				if err != nil {
					t.Fatal(err)
				}
				_ = s.Listener.Close()
				s.Listener = l
			}
			s.Start()
			defer s.Close()
			url := s.URL
			if strings.Contains(c.local, ":") {
				_, port, _ := net.SplitHostPort(s.Listener.Addr().String())
				url = "http://[::1]:" + port
			}
			status, p := v.send(t, c.local, url, c.fields...)
			if c.reason == "" && status != http.StatusOK || c.reason != "" && (status != http.StatusForbidden || p.Reason != string(c.reason)) {
				t.Errorf("got %d %v, want %q", status, p, c.reason)
			}
		})
	}
}

// TestSourceUnknown: without an address a scope that names places refuses, and
// the refusal does not use the action up.
func TestSourceUnknown(t *testing.T) {
	v := newVenue(t)
	v.rescope(t, `"source_networks":["192.0.2.0/24"]`)
	r, compact := v.receiver(t), []byte(v.action(t, nil))
	if _, err := r.Verify(t.Context(), compact, nil); !refusedWith(err, verify.ReasonSourceNetwork) {
		t.Errorf("from nowhere: %v", err)
	}
	for address, reason := range map[string]verify.Reason{"198.51.100.1": verify.ReasonSourceNetwork, "::ffff:192.0.2.1": ""} {
		_, err := r.VerifyArrival(t.Context(), compact, verify.Arrival{From: netip.MustParseAddr(address)})
		if reason == "" && err != nil || reason != "" && !refusedWith(err, reason) {
			t.Errorf("from %s: %v", address, err)
		}
	}
	v.config.Forwarding = &source.Forwarding{Header: "X-Real-IP"}
	if _, err := verify.NewReceiver(v.config); err == nil || !strings.Contains(err.Error(), "X-Real-IP") {
		t.Errorf("a header of another name: %v", err)
	}
}

func refusedWith(err error, reason verify.Reason) bool {
	return errors.Is(err, &verify.Refusal{Reason: reason})
}
