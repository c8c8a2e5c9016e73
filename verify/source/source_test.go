package source_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/maxmind/mmdbwriter"
	"github.com/maxmind/mmdbwriter/mmdbtype"

	"inkan/scope"
	"inkan/verify/source"
)

const feed = "# a comment, and an empty line\r\n\n" +
	"192.0.2.0/24,FR,FR-IDF,Paris,\n192.0.2.64/26,DE,DE-HE,\"Frankfurt, am Main\",60311\n192.0.2.65,,,,\r\n" +
	"198.51.100.0/24,ZZ,,,\n2001:db8::/32,US\n2001:db8:7::/48,US,US-NY,,\n"

func TestGeofeed(t *testing.T) {
	g, err := source.ParseGeofeed([]byte(feed))
	if err != nil {
		t.Fatal(err)
	}
	for address, want := range map[string][]string{
		"192.0.2.1": {"FR", "FR-IDF"}, "192.0.2.64": {"DE", "DE-HE"}, "192.0.2.127": {"DE", "DE-HE"}, "192.0.2.128": {"FR", "FR-IDF"},
		"192.0.2.65": nil, "198.51.100.1": nil, "203.0.113.1": nil, "::ffff:192.0.2.1": {"FR", "FR-IDF"},
		"2001:db8::1": {"US"}, "2001:db8:7::1": {"US", "US-NY"}, "2001:db9::1": nil,
	} {
		if got, err := g.Lookup(netip.MustParseAddr(address)); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: got %v %v, want %v", address, got, err, want)
		}
	}
}

func TestBadGeofeeds(t *testing.T) {
	for text, want := range map[string]string{
		"":                                              "no prefix",
		"# nothing\n":                                   "no prefix",
		"192.0.2.0/24\n":                                "line 1",
		"192.0.2.1/24,FR,,,":                            "without host bits",
		"192.0.2/24,FR,,,":                              "without host bits",
		"::ffff:192.0.2.0/120,FR,,,":                    "without host bits",
		"fe80::1%eth0,FR,,,":                            "without host bits",
		" 192.0.2.0/24,FR,,,":                           "without host bits",
		"\ufeff192.0.2.0/24,FR,,,":                      "without host bits",
		"192.0.2.0/24,fr,,,":                            "ISO 3166-1",
		"192.0.2.0/24,UK,,,":                            "ISO 3166-1",
		"192.0.2.0/24,FR-IDF,,,":                        "ISO 3166-1",
		"192.0.2.0/24,FR ,,,":                           "ISO 3166-1",
		"192.0.2.0/24,FR,IDF,,":                         "ISO 3166-2 in FR",
		"192.0.2.0/24,FR,DE-HE,,":                       "ISO 3166-2 in FR",
		"192.0.2.0/24,,FR-IDF,,":                        "no country",
		"192.0.2.0/24,FR,,,\n192.0.2.0/24,DE,,":         "line 2: 192.0.2.0/24 stands twice",
		"192.0.2.1,FR,,,\n192.0.2.1/32,FR,,":            "line 2: 192.0.2.1/32 stands twice",
		"192.0.2.0/24,FR,,\xff,":                        "UTF-8",
		"192.0.2.0/24,FR,," + strings.Repeat("x", 1024): "at most 1024",
	} {
		if _, err := source.ParseGeofeed([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: got %v, want something about %q", text, err, want)
		}
	}
}

func FuzzGeofeed(f *testing.F) {
	f.Add([]byte(feed))
	f.Add([]byte("192.0.2.0/24,FR,,,"))
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := source.ParseGeofeed(b)
		if err != nil {
			return
		}
		for _, a := range []string{"192.0.2.1", "2001:db8::1", "0.0.0.0", "::"} {
			list, err := g.Lookup(netip.MustParseAddr(a))
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range list {
				if !scope.ValidRegion(r) {
					t.Fatalf("%s is in %q", a, r)
				}
			}
		}
	})
}

// database writes an MMDB file as its maker's own library does.
func database(t *testing.T, path, country, region string) {
	t.Helper()
	w, err := mmdbwriter.New(mmdbwriter.Options{DatabaseType: "Test-City", IncludeReservedNetworks: true})
	if err != nil {
		t.Fatal(err)
	}
	for network, record := range map[string]mmdbtype.Map{
		"127.0.0.2/32":   {"country": mmdbtype.Map{"iso_code": mmdbtype.String(country)}, "subdivisions": mmdbtype.Slice{mmdbtype.Map{"iso_code": mmdbtype.String(region)}}, "registered_country": mmdbtype.Map{"iso_code": mmdbtype.String("US")}},
		"192.0.2.0/24":   {"registered_country": mmdbtype.Map{"iso_code": mmdbtype.String("FR")}},
		"203.0.113.0/24": {"country": mmdbtype.Map{"iso_code": mmdbtype.Uint32(7)}},
		"2001:db8::/32":  {"country": mmdbtype.Map{"iso_code": mmdbtype.String("DE")}},
	} {
		_, n, err := net.ParseCIDR(network)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Insert(n, record); err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	if _, err := w.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	replace(t, path, b.Bytes())
}

func replace(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func TestMMDB(t *testing.T) {
	path := filepath.Join(t.TempDir(), "regions.mmdb")
	database(t, path, "FR", "IDF")
	f, err := source.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	for address, want := range map[string][]string{
		"127.0.0.2": {"FR", "FR-IDF"}, "::ffff:127.0.0.2": {"FR", "FR-IDF"}, "127.0.0.3": nil, "2001:db8::1": {"DE"},
		"192.0.2.1": nil, // where it is registered does not count
	} {
		if got, err := f.Lookup(netip.MustParseAddr(address)); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: got %v %v, want %v", address, got, err, want)
		}
	}
	if got, err := f.Lookup(netip.MustParseAddr("203.0.113.1")); err == nil {
		t.Errorf("a country of another type is %v", got)
	}
	database(t, path, "DE", "HE")
	if got, err := f.Lookup(netip.MustParseAddr("127.0.0.2")); err != nil || !slices.Equal(got, []string{"DE", "DE-HE"}) {
		t.Errorf("after the file changed: %v %v", got, err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	replace(t, path, b[:len(b)/2])
	if got, err := f.Lookup(netip.MustParseAddr("127.0.0.2")); err == nil {
		t.Errorf("half a file says %v", got)
	}
}

// TestReload: new data count at once, and data that cannot be read are none.
func TestReload(t *testing.T) {
	path := filepath.Join(t.TempDir(), "feed.csv")
	if _, err := source.Open(path); err == nil {
		t.Fatal("a file that is missing was opened")
	}
	for name, want := range map[string]string{"feed.txt": ".csv", "feed.csv": "line 1"} {
		other := filepath.Join(t.TempDir(), name)
		replace(t, other, []byte("nonsense"))
		if _, err := source.Open(other); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want something about %s", name, err, want)
		}
	}
	replace(t, path, []byte("127.0.0.0/8,FR,,,\n"))
	f, err := source.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	s := scoped(t, `"source_regions":["FR"]`)
	here := netip.MustParseAddr("127.0.0.1")
	for _, step := range []struct{ content, refused string }{
		{"", ""}, {"127.0.0.0/8,DE,,,\n", "comes from DE"}, {"nonsense", "line 1"}, {"127.0.0.0/8,FR,,,\n", ""}, {"192.0.2.0/24,FR,,,\n", "no region that is known"}, {"-", "cannot be read"}, {"127.0.0.0/8,FR,,,\n", ""},
	} {
		switch step.content {
		case "":
		case "-":
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		default:
			replace(t, path, []byte(step.content))
		}
		err := source.Check(s, here, f)
		told, cause := fmt.Sprint(err), fmt.Sprint(errors.Unwrap(err))
		if step.refused == "" && err != nil || step.refused != "" && (!errors.Is(err, &scope.Refusal{Rule: scope.RuleSourceRegion}) || !strings.Contains(told+cause, step.refused)) {
			t.Errorf("with %q: got %v, want %q", step.content, err, step.refused)
		}
		if err != nil && strings.Contains(err.Error(), path) {
			t.Errorf("the refusal has a path in it: %v", err)
		}
	}
}

func scoped(t *testing.T, members string) *scope.Scope {
	t.Helper()
	s, err := scope.Parse([]byte(`{"version":1,"allowed_actions":["order.cancel"],"allowed_venues":["XPAR"],` + members + `}`))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestCheck(t *testing.T) {
	g, err := source.ParseGeofeed([]byte(feed))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		members, address string
		regions          source.Regions
		rule             scope.Rule
	}{
		{`"allow_short":false`, "192.0.2.1", nil, ""},
		{`"source_networks":["192.0.2.0/24"]`, "192.0.2.1", nil, ""},
		{`"source_networks":["192.0.2.0/24"]`, "::ffff:192.0.2.1", nil, ""},
		{`"source_networks":["192.0.2.0/24"]`, "198.51.100.1", nil, scope.RuleSourceNetwork},
		{`"source_networks":["192.0.2.0/24"]`, "", nil, scope.RuleSourceNetwork},
		{`"source_regions":["FR"]`, "192.0.2.1", nil, scope.RuleSourceRegion},
		{`"source_regions":["FR"]`, "192.0.2.1", g, ""},
		{`"source_regions":["FR"]`, "192.0.2.65", g, scope.RuleSourceRegion},
		{`"source_regions":["FR"]`, "", g, scope.RuleSourceRegion},
		{`"source_regions":["FR"]`, "192.0.2.64", g, scope.RuleSourceRegion},
		{`"source_regions":["FR"],"source_networks":["198.51.100.0/24"]`, "192.0.2.1", g, scope.RuleSourceNetwork},
	} {
		var a netip.Addr
		if c.address != "" {
			a = netip.MustParseAddr(c.address)
		}
		err := source.Check(scoped(t, c.members), a, c.regions)
		if c.rule == "" && err != nil || c.rule != "" && !errors.Is(err, &scope.Refusal{Rule: c.rule}) {
			t.Errorf("%s from %q: got %v, want %q", c.members, c.address, err, c.rule)
		}
	}
}

// server answers with the address that a request comes from.
func server(t *testing.T, listen string, f *source.Forwarding) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a, err := f.Address(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		_, _ = io.WriteString(w, a.String())
	}))
	l, err := net.Listen("tcp", listen)
	if err != nil {
		t.Fatal(err)
	}
	_ = s.Listener.Close()
	s.Listener = l
	t.Cleanup(s.Close)
	return s
}

// dial is a client whose connections come from a local address.
func dial(local string, config *tls.Config) *http.Client {
	d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(local)}}
	return &http.Client{Transport: &http.Transport{TLSClientConfig: config, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		return d.DialContext(ctx, network, address)
	}}}
}

// ask sends a request with header fields, each "Name: value".
func ask(t *testing.T, c *http.Client, url string, fields ...string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ": ")
		req.Header.Add(name, value)
	}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, strings.TrimSpace(string(b))
}

// TestForwarding: only a proxy is believed, over real connections from 127.0.0.x and ::1.
func TestForwarding(t *testing.T) {
	proxies := []netip.Prefix{netip.MustParsePrefix("127.0.0.9/32")}
	xff := &source.Forwarding{Header: source.HeaderForwardedFor, Networks: proxies}
	std := &source.Forwarding{Header: source.HeaderForwarded, Networks: proxies}
	for _, c := range []struct {
		name   string
		f      *source.Forwarding
		local  string
		fields []string
		want   string // empty: refused
	}{
		{"no proxy configured", nil, "127.0.0.2", []string{"X-Forwarded-For: 192.0.2.1", "Forwarded: for=192.0.2.1"}, "127.0.0.2"},
		{"header from elsewhere", xff, "127.0.0.2", []string{"X-Forwarded-For: 192.0.2.1"}, "127.0.0.2"},
		{"no header from elsewhere", xff, "127.0.0.3", nil, "127.0.0.3"},
		{"proxy", xff, "127.0.0.9", []string{"X-Forwarded-For: 192.0.2.1"}, "192.0.2.1"},
		{"proxy, IPv6", xff, "127.0.0.9", []string{"X-Forwarded-For: 2001:db8::1"}, "2001:db8::1"},
		{"proxy, IPv4 as IPv6", xff, "127.0.0.9", []string{"X-Forwarded-For: ::ffff:192.0.2.1"}, "192.0.2.1"},
		{"proxy without a header", xff, "127.0.0.9", nil, ""},
		{"proxy with the other header alone", xff, "127.0.0.9", []string{"Forwarded: for=192.0.2.1"}, ""},
		{"two headers", xff, "127.0.0.9", []string{"X-Forwarded-For: 192.0.2.1", "X-Forwarded-For: 192.0.2.1"}, ""},
		{"a list", xff, "127.0.0.9", []string{"X-Forwarded-For: 192.0.2.1, 198.51.100.1"}, ""},
		{"a port", xff, "127.0.0.9", []string{"X-Forwarded-For: 192.0.2.1:80"}, ""},
		{"brackets", xff, "127.0.0.9", []string{"X-Forwarded-For: [2001:db8::1]"}, ""},
		{"another spelling", xff, "127.0.0.9", []string{"X-Forwarded-For: 2001:0db8::1"}, ""},
		{"a zone", xff, "127.0.0.9", []string{"X-Forwarded-For: fe80::1%eth0"}, ""},
		{"a name", xff, "127.0.0.9", []string{"X-Forwarded-For: unknown"}, ""},
		{"empty", xff, "127.0.0.9", []string{"X-Forwarded-For: "}, ""},
		{"Forwarded from elsewhere", std, "127.0.0.2", []string{"Forwarded: for=192.0.2.1"}, "127.0.0.2"},
		{"Forwarded", std, "127.0.0.9", []string{"Forwarded: for=192.0.2.1"}, "192.0.2.1"},
		{"Forwarded with more", std, "127.0.0.9", []string{`Forwarded: proto=https;for=192.0.2.1;by="[2001:db8::9]";host=venue.example`}, "192.0.2.1"},
		{"Forwarded, IPv6", std, "127.0.0.9", []string{`Forwarded: for="[2001:db8::1]"`}, "2001:db8::1"},
		{"Forwarded, two elements", std, "127.0.0.9", []string{"Forwarded: for=192.0.2.1, for=198.51.100.1"}, ""},
		{"Forwarded, two elements in quotes", std, "127.0.0.9", []string{`Forwarded: for="[2001:db8::1]",for="[2001:db8::2]"`}, ""},
		{"Forwarded, for twice", std, "127.0.0.9", []string{"Forwarded: for=192.0.2.1;for=198.51.100.1"}, ""},
		{"Forwarded, another case", std, "127.0.0.9", []string{"Forwarded: For=192.0.2.1"}, ""},
		{"Forwarded, hidden", std, "127.0.0.9", []string{"Forwarded: for=_hidden"}, ""},
		{"Forwarded, without for", std, "127.0.0.9", []string{"Forwarded: proto=https"}, ""},
		{"Forwarded, a port", std, "127.0.0.9", []string{`Forwarded: for="192.0.2.1:80"`}, ""},
		{"Forwarded, a port after brackets", std, "127.0.0.9", []string{`Forwarded: for="[2001:db8::1]:80"`}, ""},
		{"Forwarded, IPv6 without brackets", std, "127.0.0.9", []string{`Forwarded: for="2001:db8::1"`}, ""},
		{"Forwarded, IPv4 in brackets", std, "127.0.0.9", []string{`Forwarded: for="[192.0.2.1]"`}, ""},
		{"Forwarded, an escape", std, "127.0.0.9", []string{`Forwarded: for="[2001:db8\::1]"`}, ""},
		{"Forwarded, another parameter", std, "127.0.0.9", []string{"Forwarded: for=192.0.2.1;secret=x"}, ""},
		{"Forwarded, something after the end", std, "127.0.0.9", []string{"Forwarded: for=192.0.2.1;"}, ""},
		{"Forwarded, too long", std, "127.0.0.9", []string{"Forwarded: host=" + strings.Repeat("x", 1024) + ";for=192.0.2.1"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := server(t, "127.0.0.1:0", c.f)
			s.Start()
			status, got := ask(t, dial(c.local, nil), s.URL, c.fields...)
			if c.want == "" && status != http.StatusForbidden || c.want != "" && got != c.want {
				t.Errorf("got %d %s, want %q", status, got, c.want)
			}
		})
	}
}

// TestIPv6 has a server of both families: IPv4 peers arrive as IPv6.
func TestIPv6(t *testing.T) {
	s := server(t, "[::]:0", nil)
	s.Start()
	port := s.Listener.Addr().(*net.TCPAddr).Port
	if _, got := ask(t, dial("::1", nil), fmt.Sprintf("http://[::1]:%d", port)); got != "::1" {
		t.Errorf("from ::1: got %s", got)
	}
	if _, got := ask(t, dial("127.0.0.2", nil), fmt.Sprintf("http://127.0.0.1:%d", port)); got != "127.0.0.2" {
		t.Errorf("from 127.0.0.2: got %s", got)
	}
	for _, bad := range []string{"", "@", "pipe", "127.0.0.1", "localhost:80"} {
		if a, err := source.Peer(bad); err == nil {
			t.Errorf("%q is %s", bad, a)
		}
	}
}

// certificate makes a TLS client's certificate that is its own CA.
func certificate(t *testing.T) tls.Certificate {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k, Leaf: leaf}
}

// TestForwardingKeys: a proxy is known by its TLS certificate.
func TestForwardingKeys(t *testing.T) {
	proxy, other := certificate(t), certificate(t)
	key := sha256.Sum256(proxy.Leaf.RawSubjectPublicKeyInfo)
	both := &source.Forwarding{Header: source.HeaderForwarded, Keys: [][32]byte{key}, Networks: []netip.Prefix{netip.MustParsePrefix("127.0.0.9/32")}}
	for _, c := range []struct {
		name  string
		f     *source.Forwarding
		local string
		shown *tls.Certificate
		want  string
	}{
		{"its key", &source.Forwarding{Header: source.HeaderForwarded, Keys: [][32]byte{key}}, "127.0.0.2", &proxy, "192.0.2.1"},
		{"another key", &source.Forwarding{Header: source.HeaderForwarded, Keys: [][32]byte{key}}, "127.0.0.2", &other, "127.0.0.2"},
		{"no certificate", &source.Forwarding{Header: source.HeaderForwarded, Keys: [][32]byte{key}}, "127.0.0.2", nil, "127.0.0.2"},
		{"key and network", both, "127.0.0.9", &proxy, "192.0.2.1"},
		{"key from another network", both, "127.0.0.2", &proxy, "127.0.0.2"},
		{"another key from the network", both, "127.0.0.9", &other, "127.0.0.9"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := server(t, "127.0.0.1:0", c.f)
			pool := x509.NewCertPool()
			pool.AddCert(proxy.Leaf)
			pool.AddCert(other.Leaf)
			s.TLS = &tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool}
			s.StartTLS()
			roots := x509.NewCertPool()
			roots.AddCert(s.Certificate())
			config := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots}
			if c.shown != nil {
				config.Certificates = []tls.Certificate{*c.shown}
			}
			if _, got := ask(t, dial(c.local, config), s.URL, "Forwarded: for=192.0.2.1"); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}

func TestValidate(t *testing.T) {
	local := []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	for want, f := range map[string]*source.Forwarding{
		"X-Real-IP":         {Header: "X-Real-IP", Networks: local},
		"neither networks":  {Header: source.HeaderForwarded},
		"without host bits": {Header: source.HeaderForwarded, Networks: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/8")}},
	} {
		if err := f.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want something about %s", err, want)
		}
	}
	if err := (*source.Forwarding)(nil).Validate(); err != nil {
		t.Error(err)
	}
}

func FuzzForwarded(f *testing.F) {
	f.Add("for=192.0.2.1")
	f.Add(`proto=https;for="[2001:db8::1]"`)
	proxy := &source.Forwarding{Header: source.HeaderForwarded, Networks: []netip.Prefix{netip.MustParsePrefix("127.0.0.9/32")}}
	f.Fuzz(func(t *testing.T, text string) {
		req := &http.Request{RemoteAddr: "127.0.0.9:1", Header: http.Header{"Forwarded": {text}}}
		a, err := proxy.Address(req)
		if err != nil {
			return
		}
		if !a.IsValid() || a.Zone() != "" || strings.Count(text, "for=") == 0 || !strings.Contains(text, a.String()) && !strings.Contains(text, "::ffff:"+a.String()) {
			t.Fatalf("%q is %s", text, a)
		}
	})
}
