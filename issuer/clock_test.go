package issuer_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"inkan/issuer"
	"inkan/scope"
)

func (o *office) lists(t *testing.T) (*x509.RevocationList, *scope.KillList) {
	t.Helper()
	crl, err := x509.ParseRevocationList(get(t, "http://"+o.addresses.Public+"/crl"))
	o.must(t, err)
	kills, err := scope.ParseKillList(strings.TrimSuffix(string(get(t, "http://"+o.addresses.Public+"/kills")), "\n"), o.ca.PublicKey)
	o.must(t, err)
	return crl, kills
}

// handshake connects to the hosts' API, by a clock of one's own.
func (o *office) handshake(at time.Time) error {
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", o.addresses.Agent, &tls.Config{RootCAs: o.roots, Time: func() time.Time { return at }})
	if err == nil {
		err = c.Close()
	}
	return err
}

// TestClockSetBack: what was made while the clock was ahead is not served on when
// it was set right, and numbers still grow: receivers refuse a lower one.
func TestClockSetBack(t *testing.T) {
	o := newOffice(t)
	real := time.Now()
	o.clock(real.Add(10 * time.Hour))
	crl, kills := o.lists(t)
	o.must(t, o.handshake(real.Add(10*time.Hour)))
	o.clock(real)
	again, killsAgain := o.lists(t)
	if again.ThisUpdate.After(real) || killsAgain.ThisUpdate.After(real) {
		t.Errorf("lists of %s and %s are served at %s", again.ThisUpdate, killsAgain.ThisUpdate, real)
	}
	if again.Number.Cmp(crl.Number) <= 0 || killsAgain.Number <= kills.Number {
		t.Errorf("numbers went from %d and %d to %d and %d", crl.Number, kills.Number, again.Number, killsAgain.Number)
	}
	if err := o.handshake(real); err != nil {
		t.Errorf("after the clock was set right: %v", err)
	}
	// Another process knows the numbers that were used.
	restarted, err := o.again()
	o.must(t, err)
	defer restarted.Close()
	der, err := restarted.CRL(t.Context())
	o.must(t, err)
	third, err := x509.ParseRevocationList(der)
	o.must(t, err)
	text, err := restarted.KillList(t.Context())
	o.must(t, err)
	killsThird, err := scope.ParseKillList(text, o.ca.PublicKey)
	o.must(t, err)
	if third.Number.Cmp(again.Number) <= 0 || killsThird.Number <= killsAgain.Number {
		t.Errorf("after a restart the numbers are %d and %d, they were %d and %d", third.Number, killsThird.Number, again.Number, killsAgain.Number)
	}
}

// TestFullDisk: while nothing can be written the servers go on with the
// certificates that they have, and the lists are there; nothing is issued.
func TestFullDisk(t *testing.T) {
	o := newOffice(t)
	_, err := o.enrol(t, o.dev, "a")
	o.must(t, err)
	writable := issuer.FullDisk(t, o.issuer)
	if _, err := o.enrol(t, o.dev, "a"); err == nil {
		t.Error("a certificate was issued that is not in the inventory")
	}
	if _, err := o.admin.Kill(t.Context(), issuer.KillOrder{Scope: scope.KillFirm, Reason: "x"}); err == nil {
		t.Error("a kill that is not on disk was acknowledged")
	}
	if _, kills := o.lists(t); len(kills.Kills) != 0 {
		t.Errorf("%+v", kills)
	}
	later := time.Now().Add(25 * 24 * time.Hour) // the servers' certificate would be renewed
	o.clock(later)
	if err := o.handshake(later); err != nil {
		t.Errorf("with a certificate that has five days left: %v", err)
	}
	o.lists(t)
	writable()
	if err := o.handshake(later.Add(6 * 24 * time.Hour)); err != nil {
		t.Errorf("once there is room: %v", err)
	}
}

// TestEndOfTheCA: certificates end with the CA's at the latest, so there are some
// to its end, and openssl agrees.
func TestEndOfTheCA(t *testing.T) {
	issuer.ShortCA(t, time.Hour)
	o := newOffice(t)
	g, err := o.enrol(t, o.dev, "a")
	o.must(t, err)
	end := o.ca.NotAfter
	dir := t.TempDir()
	write := func(name string, c *x509.Certificate) string {
		t.Helper()
		path := filepath.Join(dir, name)
		o.must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}), 0o600))
		return path
	}
	ca := write("ca.pem", o.ca)
	for n := range g.Certificates {
		c := leaf(t, g, n)
		if c.NotAfter.After(end) || !g.RenewAfter.Before(c.NotAfter) {
			t.Errorf("%s: until %s, renewed after %s, the CA ends %s", g.Certificates[n].Purpose, c.NotAfter, g.RenewAfter, end)
		}
		if out, err := exec.Command("openssl", "verify", "-ignore_critical", "-CAfile", ca, write("leaf.pem", c)).CombinedOutput(); err != nil {
			t.Errorf("openssl: %s", out)
		}
	}
	o.clock(end.Add(time.Second))
	if _, err := o.enrol(t, o.dev, "a"); err == nil {
		t.Error("a certificate was issued after the CA's end")
	}
}

// TestAdministratorsTimeIsUp: a connection that stands does not outlast the
// certificate that it was made with.
func TestAdministratorsTimeIsUp(t *testing.T) {
	o := newOffice(t)
	if _, err := o.admin.Devices(t.Context()); err != nil {
		t.Fatal(err)
	}
	o.clock(time.Now().Add(366 * 24 * time.Hour))
	if _, err := o.admin.Devices(t.Context()); err == nil || !strings.Contains(err.Error(), "G3") {
		t.Errorf("a year later: %v", err)
	}
}
