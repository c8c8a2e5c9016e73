package issuer_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"inkan/attest"
	"inkan/internal/attester"
	"inkan/internal/certext"
	"inkan/internal/forge"
	"inkan/internal/problem"
	"inkan/internal/testca"
	"inkan/internal/testlog"
	"inkan/issuer"
	"inkan/scope"
	"inkan/simulator"
	"inkan/verify"
)

const scopeJSON = `{"allowed_actions":["order.new"],"allowed_instruments":[{"id":"isin:FR0000120271"}],"allowed_ord_types":["2"],"allowed_sides":["1"],"allowed_tif":["0"],"allowed_venues":["XPAR"],"max_order_notional":[{"amount":"25000","currency":"EUR"}],"version":1}`

// regionsFile is an office's region data, in its directory.
const regionsFile = "regions.csv"

var selection = []attest.PCRSelection{{Bank: "sha256", Indexes: []int{0, 2, 4, 7}}}

// office is a running issuer with a device and an agent in its inventory.
type office struct {
	log       *testlog.Lines
	dir       string
	issuer    *issuer.Issuer
	again     func() (*issuer.Issuer, error) // opens it once more
	open      func(dir string) (*issuer.Issuer, error)
	clock     func(time.Time) // sets its clock
	addresses issuer.Addresses
	ca        *x509.Certificate
	roots     *x509.CertPool
	policy    *ecdsa.PrivateKey
	admin     *issuer.Client
	cert      tls.Certificate // the administrator's
	dev       *forge.Device
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newOffice(t testing.TB) *office {
	t.Helper()
	o := &office{dir: t.TempDir(), policy: newKey(t)}
	ca, admin := newKey(t), newKey(t)
	public := simulator.FreePortForTest(t)
	yaml := fmt.Sprintf("trust_domain: example.org\nca_key: test\npolicy_key: test\nagent_listen: 127.0.0.1:0\nadmin_listen: 127.0.0.1:0\npublic_listen: %s\nmetrics_listen: 127.0.0.1:0\npublic_url: http://%s\nserver_names: [127.0.0.1]\nlifetime: 24h\ncrl_lifetime: 1h\nregions: %s\n", public, public, regionsFile)
	if err := os.WriteFile(filepath.Join(o.dir, regionsFile), []byte("192.0.2.0/24,FR,,,\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	o.log = new(testlog.Lines)
	log := slog.New(slog.NewTextHandler(o.log, nil))
	if err := issuer.Init(t.Context(), o.dir, []byte(yaml), "Test CA", ca, &o.policy.PublicKey, &admin.PublicKey, log); err != nil {
		t.Fatal(err)
	}
	config, err := issuer.ParseConfig([]byte(yaml))
	if err != nil {
		t.Fatal(err)
	}
	i, err := issuer.New(t.Context(), o.dir, config, ca, log)
	if err != nil {
		t.Fatal(err)
	}
	o.open = func(dir string) (*issuer.Issuer, error) { return issuer.New(t.Context(), dir, config, ca, log) }
	o.again = func() (*issuer.Issuer, error) { return o.open(o.dir) }
	o.clock = issuer.Clock(i)
	ctx, stop := context.WithCancel(context.Background())
	ready, ended := make(chan issuer.Addresses, 1), make(chan error, 1)
	go func() { ended <- i.Serve(ctx, func(a issuer.Addresses) { ready <- a }) }()
	select {
	case o.addresses = <-ready:
	case err := <-ended:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stop()
		if err := errors.Join(<-ended, i.Close()); err != nil {
			t.Error(err)
		}
	})
	o.issuer, o.ca, o.roots = i, i.CA(), x509.NewCertPool()
	o.roots.AddCert(o.ca)
	b, err := os.ReadFile(filepath.Join(o.dir, issuer.AdminFile))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	o.cert = tls.Certificate{Certificate: [][]byte{block.Bytes}, PrivateKey: admin}
	o.admin = issuer.NewClient("https://"+o.addresses.Admin, o.ca, o.cert)
	if o.dev, err = forge.New(); err != nil {
		t.Fatal(err)
	}
	o.must(t, o.addDevice(t, "host1", o.dev))
	p, err := attest.SignPolicy(o.policy, "good", o.dev.Values(selection), attest.PolicyRef("example.org"))
	if err != nil {
		t.Fatal(err)
	}
	o.must(t, o.admin.AddPolicy(t.Context(), issuer.Policy{Device: "*", Approved: *p}))
	o.must(t, o.admin.AddAgent(t.Context(), issuer.Agent{Name: "a", Device: "host1", Scope: scopeJSON, TLS: true}))
	return o
}

func (o *office) must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (o *office) addDevice(t testing.TB, id string, d *forge.Device) error {
	t.Helper()
	pin, err := attest.SPKIDigest(d.Hello.EKPublic)
	if err != nil {
		t.Fatal(err)
	}
	return o.admin.AddDevice(t.Context(), issuer.Device{ID: id, EK: hex.EncodeToString(pin[:])})
}

func (o *office) enrol(t testing.TB, d *forge.Device, agent string) (*attest.Grant, error) {
	t.Helper()
	return d.Enrol(t.Context(), "https://"+o.addresses.Agent, o.roots, agent, nil)
}

func leaf(t testing.TB, g *attest.Grant, n int) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(g.Certificates[n].Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestEnrolAndRenew(t *testing.T) {
	o := newOffice(t)
	g, err := o.enrol(t, o.dev, "a")
	if err != nil {
		t.Fatal(err)
	}
	c := leaf(t, g, 0)
	a, err := certext.ParseAction(c)
	if err != nil {
		t.Fatal(err)
	}
	if a.Agent != "spiffe://example.org/agent/a" || string(a.Scope) != scopeJSON || a.Attestation.EK != certext.EKPinned || a.Attestation.Policy != "good" || a.Attestation.Protection != certext.ProtectionTPM {
		t.Errorf("certificate says %+v", a)
	}
	if c.SerialNumber.Sign() <= 0 || c.NotAfter.Sub(c.NotBefore) > 24*time.Hour || len(c.AuthorityKeyId) == 0 || len(c.SubjectKeyId) == 0 || len(c.CRLDistributionPoints) != 1 || len(c.OCSPServer) != 1 {
		t.Errorf("certificate = %+v", c)
	}
	tlsCert := leaf(t, g, 1)
	if _, err := tlsCert.Verify(x509.VerifyOptions{Roots: o.roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Errorf("TLS certificate: %v", err)
	}
	if _, err := certext.ParseAction(tlsCert); err == nil {
		t.Error("the TLS certificate serves for actions")
	}
	// A renewal needs no credential, and keeps the keys.
	o.dev.Clock.Clock += 5000
	again, err := o.enrol(t, o.dev, "a")
	if err != nil {
		t.Fatal(err)
	}
	if renewed := leaf(t, again, 0); !bytes.Equal(renewed.RawSubjectPublicKeyInfo, c.RawSubjectPublicKeyInfo) || renewed.SerialNumber.Cmp(c.SerialNumber) == 0 {
		t.Error("the renewal has another key, or the same serial number")
	}
}

// TestRefusals: each has the check that must decide as the first word of its
// name, and stands in the decision log.
func TestRefusals(t *testing.T) {
	for name, attack := range map[string]func(*testing.T, *office) error{
		"E9 device that is not in the inventory": func(t *testing.T, o *office) error {
			d, err := forge.New()
			o.must(t, err)
			_, err = o.enrol(t, d, "a")
			return err
		},
		"E9 agent that is not in the inventory": func(t *testing.T, o *office) error { _, err := o.enrol(t, o.dev, "b"); return err },
		"E9 agent of another device": func(t *testing.T, o *office) error {
			d, err := forge.New()
			o.must(t, err)
			o.must(t, o.addDevice(t, "host2", d))
			_, err = o.enrol(t, d, "a")
			return err
		},
		"E9 agent that is suspended": func(t *testing.T, o *office) error {
			o.must(t, o.admin.SetStatus(t.Context(), "a", issuer.Suspended))
			_, err := o.enrol(t, o.dev, "a")
			return err
		},
		"E9 another AK for the device": func(t *testing.T, o *office) error {
			_, err := o.enrol(t, o.dev, "a")
			o.must(t, err)
			other, err := forge.New()
			o.must(t, err)
			o.dev.AK, o.dev.Hello.AKPublic, o.dev.Signer = other.AK, other.Hello.AKPublic, other.Signer
			_, err = o.enrol(t, o.dev, "a")
			return err
		},
		"A3 credential that was not opened": func(t *testing.T, o *office) error {
			_, err := o.dev.Enrol(t.Context(), "https://"+o.addresses.Agent, o.roots, "a", func(ev *attest.Evidence) { ev.Secret = make([]byte, 32) })
			return err
		},
		"K2 certificate request for another key": func(t *testing.T, o *office) error {
			o.dev.ChangeCSR = func([]byte) []byte {
				csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, newKey(t))
				o.must(t, err)
				return csr
			}
			_, err := o.enrol(t, o.dev, "a")
			return err
		},
		"P1 host in another state": func(t *testing.T, o *office) error {
			o.dev.PCRs[7] = make([]byte, 32)
			_, err := o.enrol(t, o.dev, "a")
			return err
		},
		"P1 policy that was retired": func(t *testing.T, o *office) error {
			o.must(t, o.admin.RetirePolicy(t.Context(), "good"))
			_, err := o.enrol(t, o.dev, "a")
			return err
		},
		"Q6 clock that went back": func(t *testing.T, o *office) error {
			_, err := o.enrol(t, o.dev, "a")
			o.must(t, err)
			o.dev.Clock.Clock--
			_, err = o.enrol(t, o.dev, "a")
			return err
		},
		"K4 evidence over another channel": func(t *testing.T, o *office) error {
			one, two := o.begin(t), o.begin(t)
			defer one.channel.Close()
			defer two.channel.Close()
			ev := o.evidence(t, one)
			return two.channel.Post(t.Context(), "/v1/sessions/evidence", ev, new(attest.Grant))
		},
		"Q3 evidence a second time": func(t *testing.T, o *office) error {
			x := o.begin(t)
			defer x.channel.Close()
			ev := o.evidence(t, x)
			o.must(t, x.channel.Post(t.Context(), "/v1/sessions/evidence", ev, new(attest.Grant)))
			return x.channel.Post(t.Context(), "/v1/sessions/evidence", ev, new(attest.Grant))
		},
		"Q3 good evidence after bad": func(t *testing.T, o *office) error { // G1: failed stays failed
			x := o.begin(t)
			defer x.channel.Close()
			ev := o.evidence(t, x)
			bad := *ev
			bad.Secret = nil
			if err := x.channel.Post(t.Context(), "/v1/sessions/evidence", &bad, new(attest.Grant)); err == nil {
				t.Fatal("bad evidence was accepted")
			}
			return x.channel.Post(t.Context(), "/v1/sessions/evidence", ev, new(attest.Grant))
		},
		"G7 too many exchanges": func(t *testing.T, o *office) error {
			var err error
			for range 100 {
				if _, err = o.enrol(t, o.dev, "nobody"); err != nil && strings.Contains(err.Error(), "G7") {
					return err
				}
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := newOffice(t)
			err := attack(t, o)
			check, _, _ := strings.Cut(name, " ")
			p, ok := errors.AsType[*problem.Problem](err)
			if !ok || p.Check != check {
				t.Fatalf("got %v, want a refusal by %s", err, check)
			}
			if check == "G7" {
				return // before the decision log: it must not fill up
			}
			events, err := o.admin.Events(t.Context(), 0)
			o.must(t, err)
			if last := events[len(events)-1]; last.Kind != "refused" || last.Check != check {
				t.Errorf("the decision log ends with %+v", last)
			}
		})
	}
}

type exchange struct {
	channel   *attester.Channel
	challenge attest.Challenge
}

func (o *office) begin(t *testing.T) *exchange {
	t.Helper()
	x := &exchange{}
	var err error
	x.channel, err = attester.Dial(t.Context(), "https://"+o.addresses.Agent, o.roots)
	o.must(t, err)
	hello := o.dev.Hello
	hello.Agent = "a"
	o.must(t, x.channel.Post(t.Context(), "/v1/sessions", hello, &x.challenge))
	return x
}

func (o *office) evidence(t *testing.T, x *exchange) *attest.Evidence {
	t.Helper()
	binding, err := x.channel.Binding()
	o.must(t, err)
	ev, err := o.dev.Evidence(&x.challenge, binding)
	o.must(t, err)
	return ev
}

func TestChallengesDiffer(t *testing.T) {
	o := newOffice(t)
	a, b := o.begin(t), o.begin(t)
	defer a.channel.Close()
	defer b.channel.Close()
	if bytes.Equal(a.challenge.Nonce, b.challenge.Nonce) || bytes.Equal(a.challenge.Session, b.challenge.Session) {
		t.Error("two challenges are the same")
	}
}

func TestRevocation(t *testing.T) {
	o := newOffice(t)
	g, err := o.enrol(t, o.dev, "a")
	o.must(t, err)
	c := leaf(t, g, 0)
	serial := hex.EncodeToString(c.SerialNumber.Bytes())
	status := func() int {
		q, err := ocsp.CreateRequest(c, o.ca, nil)
		o.must(t, err)
		res, err := http.Post("http://"+o.addresses.Public+"/ocsp", "application/ocsp-request", bytes.NewReader(q))
		o.must(t, err)
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		o.must(t, err)
		r, err := ocsp.ParseResponseForCert(b, c, o.ca)
		o.must(t, err)
		return r.Status
	}
	if s := status(); s != ocsp.Good {
		t.Errorf("OCSP says %d, want good", s)
	}
	if err := o.admin.Revoke(t.Context(), serial, "because"); err == nil {
		t.Error("a reason that RFC 5280 does not know")
	}
	o.must(t, o.admin.Revoke(t.Context(), serial, "keyCompromise"))
	if s := status(); s != ocsp.Revoked {
		t.Errorf("OCSP says %d, want revoked", s)
	}
	if err := o.admin.Revoke(t.Context(), "00", "keyCompromise"); err == nil {
		t.Error("a certificate that does not exist was revoked")
	}
	// A receiver asks both sources.
	for name, source := range map[string]verify.Revocation{
		"OCSP": &verify.OCSP{URL: "http://" + o.addresses.Public + "/ocsp", MaxAge: time.Hour},
		"CRL":  &verify.CRL{Load: verify.HTTPLoader("http://" + o.addresses.Public + "/crl"), MaxAge: time.Hour},
	} {
		if err := source.Check(t.Context(), c, o.ca, time.Now()); !errors.Is(err, &verify.Refusal{Reason: verify.ReasonRevoked}) {
			t.Errorf("%s: got %v, want revoked", name, err)
		}
		if err := source.Check(t.Context(), leaf(t, g, 1), o.ca, time.Now()); err != nil {
			t.Errorf("%s: the other certificate: %v", name, err)
		}
		if err := source.Check(t.Context(), c, o.ca, time.Now().Add(3*time.Hour)); err == nil {
			t.Errorf("%s: what is known is too old, and it was believed: %v", name, err)
		}
	}
	// openssl judges certificate, CRL and OCSP.
	dir := t.TempDir()
	crl := get(t, "http://"+o.addresses.Public+"/crl")
	for name, b := range map[string][]byte{"leaf.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}), "ca.pem": get(t, "http://"+o.addresses.Public+"/ca.pem"), "crl.der": crl} {
		o.must(t, os.WriteFile(filepath.Join(dir, name), b, 0o600))
	}
	for _, judge := range []struct {
		args []string
		want string
	}{
		{[]string{"x509", "-in", "leaf.pem", "-noout", "-text"}, `"max_order_notional":[{"amount":"25000","currency":"EUR"}]`},
		{[]string{"verify", "-ignore_critical", "-CAfile", "ca.pem", "leaf.pem"}, "leaf.pem: OK"},
		{[]string{"crl", "-inform", "DER", "-in", "crl.der", "-CAfile", "ca.pem", "-noout", "-text"}, "Key Compromise"},
		{[]string{"ocsp", "-issuer", "ca.pem", "-cert", "leaf.pem", "-CAfile", "ca.pem", "-url", "http://" + o.addresses.Public + "/ocsp", "-no_nonce"}, "revoked"},
	} {
		cmd := exec.Command("openssl", judge.args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), judge.want) {
			t.Errorf("openssl %v: %v: %s", judge.args, err, out)
		}
	}
}

func get(t *testing.T, url string) []byte {
	t.Helper()
	res, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != 200 {
		t.Fatalf("%s: %s, %v", url, res.Status, err)
	}
	return b
}

// TestG3: the admin API answers an administrator's certificate of this CA and nothing else.
func TestG3(t *testing.T) {
	o := newOffice(t)
	g, err := o.enrol(t, o.dev, "a")
	o.must(t, err)
	other := newOffice(t)
	for name, cert := range map[string]*tls.Certificate{
		"no certificate":                {},
		"an agent's TLS certificate":    {Certificate: g.Certificates[1].Chain, PrivateKey: o.dev.Keys["tls"]},
		"an agent's action certificate": {Certificate: g.Certificates[0].Chain, PrivateKey: o.dev.Keys["action"]},
		"another CA's administrator":    &other.cert,
	} {
		if _, err := issuer.NewClient("https://"+o.addresses.Admin, o.ca, *cert).Devices(t.Context()); err == nil {
			t.Errorf("%s was let in", name)
		}
	}
	// The agents' API has no administrators' paths.
	if _, err := issuer.NewClient("https://"+o.addresses.Agent, o.ca, o.cert).Devices(t.Context()); err == nil {
		t.Error("the agents' API serves administrators")
	}
	// A revoked administrator is out.
	list, err := o.admin.Certificates(t.Context(), "")
	o.must(t, err)
	for _, c := range list {
		if c.Profile == "admin" {
			o.must(t, o.admin.Revoke(t.Context(), c.Serial, "keyCompromise"))
		}
	}
	if _, err := o.admin.Devices(t.Context()); err == nil {
		t.Error("a revoked administrator was let in")
	}
}

// TestG6: TLS 1.3 alone, and sessions are not resumed.
func TestG6(t *testing.T) {
	o := newOffice(t)
	if c, err := tls.Dial("tcp", o.addresses.Agent, &tls.Config{RootCAs: o.roots, MaxVersion: tls.VersionTLS12}); err == nil {
		_ = c.Close()
		t.Error("TLS 1.2 was accepted")
	}
	config := &tls.Config{RootCAs: o.roots, ClientSessionCache: tls.NewLRUClientSessionCache(4)}
	for range 2 {
		c, err := tls.Dial("tcp", o.addresses.Agent, config)
		o.must(t, err)
		fmt.Fprintf(c, "GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		_, _ = io.ReadAll(c) // tickets would come with it
		if c.ConnectionState().DidResume {
			t.Error("a TLS session was resumed")
		}
		_ = c.Close()
	}
}

// TestG10: one function makes certificates for others, and the CA's own is
// made beside it. An approver signs that of its TLS server with that server's own key.
func TestG10(t *testing.T) {
	out, err := exec.Command("grep", "-rn", "--include=*.go", "--exclude=*_test.go", "x509.CreateCertificate(", "..").Output()
	if err != nil {
		t.Fatal(err)
	}
	var places []string
	for line := range strings.Lines(string(out)) {
		file, _, _ := strings.Cut(line, ":")
		places = append(places, file)
	}
	want := []string{"../cmd/inkan/approver.go", "../issuer/issue.go", "../issuer/issuer.go", "../internal/testca/testca.go", "../internal/testca/testca.go"}
	for _, p := range places {
		found := false
		for _, w := range want {
			found = found || p == w
		}
		if !found {
			t.Errorf("%s makes certificates", p)
		}
	}
}

func TestInventory(t *testing.T) {
	o := newOffice(t)
	if err := o.addDevice(t, "host2", o.dev); err == nil || !strings.Contains(err.Error(), "device host2: its key is that of the device host1") {
		t.Errorf("one EK is two devices (E9): %v", err)
	}
	if err := o.admin.RemoveDevice(t.Context(), "host1"); err == nil {
		t.Error("a device with an active agent was removed")
	}
	if err := o.admin.AddAgent(t.Context(), issuer.Agent{Name: "b", Device: "nowhere", Scope: scopeJSON}); err == nil || !strings.Contains(err.Error(), `its device "nowhere" is not found`) {
		t.Errorf("an agent on a device that does not exist: %v", err)
	}
	misspelt, err := attest.SignPolicy(o.policy, "misspelt", o.dev.Values(selection), attest.PolicyRef("example.org"))
	o.must(t, err)
	if err := o.admin.AddPolicy(t.Context(), issuer.Policy{Device: "hots1", Approved: *misspelt}); err == nil || !strings.Contains(err.Error(), `its device "hots1" is not found`) {
		t.Errorf("a policy for a device that does not exist: %v", err)
	}
	if err := o.admin.AddAgent(t.Context(), issuer.Agent{Name: "b", Device: "host1", Scope: `{"version":1}`}); err == nil {
		t.Error("an agent without a valid scope")
	}
	for name, d := range map[string]issuer.Device{"an expired certificate": {AllowExpired: true}, "revocation lists": {CRLs: "-----BEGIN"}, "intermediates": {Intermediates: "-----BEGIN"}} {
		d.ID, d.EK = "host3", strings.Repeat("ab", 32)
		if err := o.admin.AddDevice(t.Context(), d); err == nil || !strings.Contains(err.Error(), "pinned") {
			t.Errorf("%s for a pinned EK, of which no certificate is asked: %v", name, err)
		}
	}
	p, err := attest.SignPolicy(newKey(t), "theirs", o.dev.Values(selection), attest.PolicyRef("example.org"))
	o.must(t, err)
	if err := o.admin.AddPolicy(t.Context(), issuer.Policy{Device: "*", Approved: *p}); err == nil {
		t.Error("a policy by another key was taken")
	}
	g, err := o.enrol(t, o.dev, "a")
	o.must(t, err)
	o.must(t, o.admin.SetStatus(t.Context(), "a", issuer.Retired))
	list, err := o.admin.Certificates(t.Context(), "a")
	o.must(t, err)
	for _, c := range list {
		if c.Revoked.IsZero() {
			t.Errorf("certificate %s of a retired agent is not revoked", c.Serial)
		}
	}
	if len(list) != len(g.Certificates) {
		t.Errorf("%d certificates, want %d", len(list), len(g.Certificates))
	}
	o.must(t, o.admin.RemoveDevice(t.Context(), "host1"))
}

// TestE5: a device whose record has the vendor's revocation list is refused
// once the vendor has revoked its EK certificate, or the list is over.
func TestE5(t *testing.T) {
	for name, c := range map[string]struct {
		revoked int64
		next    time.Duration
		refused bool
	}{"good": {5, time.Hour, false}, "revoked": {77, time.Hour, true}, "over": {5, -time.Minute, true}} {
		t.Run(name, func(t *testing.T) {
			o := newOffice(t)
			vendor := testca.New(t)
			d, err := forge.New()
			o.must(t, err)
			d.Hello.EKCertificate, err = x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(77), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
				KeyUsage: x509.KeyUsageKeyEncipherment, BasicConstraintsValid: true, UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}}}, vendor.Certificate, &d.EK.PublicKey, vendor.Key)
			o.must(t, err)
			crl, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(c.next),
				RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: big.NewInt(c.revoked), RevocationTime: time.Now()}}}, vendor.Certificate, vendor.Key)
			o.must(t, err)
			ek, err := attest.SPKIDigest(d.Hello.EKPublic)
			o.must(t, err)
			o.must(t, o.admin.AddDevice(t.Context(), issuer.Device{ID: "host2", EK: hex.EncodeToString(ek[:]), Roots: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: vendor.Certificate.Raw})),
				CRLs: string(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: crl}))}))
			o.must(t, o.admin.AddAgent(t.Context(), issuer.Agent{Name: "b", Device: "host2", Scope: scopeJSON}))
			_, err = o.enrol(t, d, "b")
			if p, ok := errors.AsType[*problem.Problem](err); c.refused && (!ok || p.Check != "E5") || !c.refused && err != nil {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestBadRequests(t *testing.T) {
	o := newOffice(t)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: o.roots}}}
	for name, body := range map[string]string{"empty": "", "not JSON": "{", "unknown member": `{"x":1}`, "too large": strings.Repeat(" ", 200<<10), "null": "null", "array": "[]"} {
		for _, path := range []string{"/v1/sessions", "/v1/sessions/evidence"} {
			res, err := client.Post("https://"+o.addresses.Agent+path, "application/json", strings.NewReader(body))
			o.must(t, err)
			var p problem.Problem
			err = json.NewDecoder(res.Body).Decode(&p)
			_ = res.Body.Close()
			if res.StatusCode/100 != 4 || err != nil || p.Detail == "" {
				t.Errorf("%s to %s: status %d, %+v, %v", name, path, res.StatusCode, p, err)
			}
		}
	}
}

// BenchmarkRenewal is a whole renewal: TLS connection, two requests,
// appraisal, decision log, two certificates.
func BenchmarkRenewal(b *testing.B) {
	o := newOffice(b)
	issuer.Unlimited(b)
	if _, err := o.enrol(b, o.dev, "a"); err != nil {
		b.Fatal(err)
	}
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := o.enrol(b, o.dev, "a"); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte("trust_domain: example.org\nca_key: test\nlifetime: 24h\n"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		_, _ = issuer.ParseConfig(b) // it must not crash
	})
}

// TestKills: what an administrator stops is in the signed list at once, for
// signers and receivers, and what is malformed is in none.
func TestKills(t *testing.T) {
	o := newOffice(t)
	for name, k := range map[string]issuer.KillOrder{
		"no agent": {Scope: scope.KillAgent, Reason: "x"}, "an unknown agent": {Scope: scope.KillAgent, Agent: "zz-99", Reason: "x"}, "no reason": {Scope: scope.KillFirm}, "no venue": {Scope: scope.KillVenue, Reason: "x"},
		"an agent of a firm": {Scope: scope.KillFirm, Agent: "mm-07", Reason: "x"}, "a scope": {Scope: "galaxy", Reason: "x"},
	} {
		if _, err := o.admin.Kill(t.Context(), k); err == nil {
			t.Errorf("%s: a kill was made", name)
		}
	}
	list := func() *scope.KillList {
		t.Helper()
		l, err := scope.ParseKillList(strings.TrimSuffix(string(get(t, "http://"+o.addresses.Public+"/kills")), "\n"), o.ca.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	if l := list(); len(l.Kills) != 0 {
		t.Errorf("%+v", l)
	}
	k, err := o.admin.Kill(t.Context(), issuer.KillOrder{Scope: scope.KillVenue, Venue: "XPAR", Reason: "halted"})
	if err != nil {
		t.Fatal(err)
	}
	if l := list(); len(l.Kills) != 1 || l.Kills[0] != *k {
		t.Errorf("%+v, %+v", l, k)
	}
	for venue, want := range map[string]error{"XPAR": &verify.Refusal{Reason: verify.ReasonKilled}, "XLON": nil} {
		r := &verify.KillList{MaxAge: time.Minute, Load: verify.HTTPLoader("http://" + o.addresses.Public + "/kills")}
		if err := r.Check(t.Context(), "spiffe://example.org/agent/mm-07", venue, o.ca, time.Now()); !errors.Is(err, want) {
			t.Errorf("%s: %v", venue, err)
		}
	}
	if all, err := o.admin.Kills(t.Context()); err != nil || len(all) != 1 {
		t.Errorf("%+v, %v", all, err)
	}
	if err := o.admin.LiftKill(t.Context(), k.ID); err != nil {
		t.Fatal(err)
	}
	if err := o.admin.LiftKill(t.Context(), k.ID); err == nil {
		t.Error("a kill was lifted twice")
	}
	if l := list(); len(l.Kills) != 0 {
		t.Errorf("%+v", l)
	}
}

// TestK8: a key that was compromised is certified no more, for no agent; one whose
// certificate was revoked for another reason is.
func TestK8(t *testing.T) {
	o := newOffice(t)
	revoke := func(reason string) {
		t.Helper()
		g, err := o.enrol(t, o.dev, "a")
		o.must(t, err)
		// openssl shows serial numbers in capitals.
		o.must(t, o.admin.Revoke(t.Context(), fmt.Sprintf("%X", leaf(t, g, 0).SerialNumber), reason))
	}
	revoke("superseded")
	revoke("keyCompromise")
	o.must(t, o.admin.AddAgent(t.Context(), issuer.Agent{Name: "b", Device: "host1", Scope: scopeJSON}))
	for _, agent := range []string{"a", "b"} {
		if _, err := o.enrol(t, o.dev, agent); err == nil || !strings.Contains(err.Error(), "K8") {
			t.Errorf("agent %s: %v, want K8", agent, err)
		}
	}
	delete(o.dev.Keys, "action")
	if _, err := o.enrol(t, o.dev, "a"); err != nil {
		t.Errorf("with another key: %v", err)
	}
}

// TestRevokedOnce: the first reason stays, and the decision log says no other
// one, but for a compromise that is learned of later.
func TestRevokedOnce(t *testing.T) {
	o := newOffice(t)
	g, err := o.enrol(t, o.dev, "a")
	o.must(t, err)
	serial := fmt.Sprintf("%x", leaf(t, g, 0).SerialNumber)
	o.must(t, o.admin.Revoke(t.Context(), serial, "superseded"))
	if err := o.admin.Revoke(t.Context(), serial, "unspecified"); err == nil || !strings.Contains(err.Error(), "superseded") {
		t.Errorf("a second revocation: %v", err)
	}
	last := func() issuer.Event {
		events, err := o.admin.Events(t.Context(), 0)
		o.must(t, err)
		return events[len(events)-1]
	}
	if x := last(); x.Kind != "revoked" || !strings.Contains(x.Detail, "superseded") {
		t.Errorf("the log ends with %+v", x)
	}
	o.must(t, o.admin.Revoke(t.Context(), serial, "keyCompromise"))
	if x := last(); !strings.Contains(x.Detail, "keyCompromise") {
		t.Errorf("the log ends with %+v", x)
	}
	crl, _ := o.lists(t)
	if len(crl.RevokedCertificateEntries) != 1 || crl.RevokedCertificateEntries[0].ReasonCode != 1 {
		t.Errorf("the CRL has %+v", crl.RevokedCertificateEntries)
	}
}

// TestKillsFit: a kill that would make the list too long for who reads it is
// refused, and the list stays one that is read.
func TestKillsFit(t *testing.T) {
	o := newOffice(t)
	agent := strings.Repeat("a", 63)
	o.must(t, o.admin.AddAgent(t.Context(), issuer.Agent{Name: agent, Device: "host1", Scope: scopeJSON}))
	added := 0
	var err error
	for ; added < scope.MaxKills; added++ { // each mark takes two bytes in the list
		if _, err = o.admin.Kill(t.Context(), issuer.KillOrder{Scope: scope.KillVenue, Agent: agent, Venue: "XPAR", Reason: strings.Repeat(`"`, 256)}); err != nil {
			break
		}
	}
	if err == nil || !strings.Contains(err.Error(), "shorter reason") {
		t.Fatalf("%d kills: %v", added, err)
	}
	l, err := scope.ParseKillList(strings.TrimSuffix(string(get(t, "http://"+o.addresses.Public+"/kills")), "\n"), o.ca.PublicKey)
	o.must(t, err)
	if len(l.Kills) != added {
		t.Errorf("the list has %d kills, %d were added", len(l.Kills), added)
	}
}
