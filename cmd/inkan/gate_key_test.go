package main

import (
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"inkan/internal/keyuri"
	"inkan/simulator"
)

// keygen has the command make a key, whose URI it prints.
func keygen(t *testing.T, args ...string) string {
	t.Helper()
	code, out, errs := call("", args...)
	if code != 0 {
		t.Fatalf("%v: %s", args, errs)
	}
	return strings.TrimSpace(out)
}

// publicOf opens a key for as long as that takes.
func publicOf(t *testing.T, uri string) crypto.PublicKey {
	t.Helper()
	k, closer, err := keyuri.Open(uri)
	if err != nil {
		t.Fatal(err)
	}
	defer closer.Close()
	return k.Public()
}

// token is a SoftHSM token that the processes of a test find, and its URI.
func token(t *testing.T) (s *simulator.SoftHSM, uri string) {
	t.Helper()
	s = simulator.SoftHSMForTest(t)
	t.Setenv("SOFTHSM2_CONF", s.Config)
	return s, fmt.Sprintf("pkcs11:token=%s?module-path=%s&pin-source=file:%s", s.Label, s.Module, s.PINFile)
}

// TestGateKeyInDevice: the gate's own TLS key may be in a TPM or a token; the process that
// has confined itself signs each handshake there, and takes a renewed certificate for the key and no other.
func TestGateKeyInDevice(t *testing.T) {
	devices := map[string]func(t *testing.T, v *gateVenue) (uri, more string){
		"tpm": func(t *testing.T, _ *gateVenue) (uri, more string) {
			sim := simulator.TPMForTest(t)
			return keygen(t, "tpm", "keygen", "--tpm", sim.Address, "--out", filepath.Join(t.TempDir(), "gate.tss2.pem")), ""
		},
		"pkcs11": func(t *testing.T, _ *gateVenue) (uri, more string) {
			s, uri := token(t)
			return keygen(t, "hsm", "keygen", "--token", uri, "--label", "gate"), fmt.Sprintf("sandbox: {write: [%q]}\n", s.Dir) // what the module needs
		},
	}
	for name, device := range devices {
		t.Run(name, func(t *testing.T) {
			v := newGateVenue(t)
			uri, more := device(t, v)
			if !strings.HasPrefix(uri, name+":") {
				t.Fatalf("the key is %s", uri)
			}
			certificate, serial := filepath.Join(v.dir, "gate.pem"), int64(1000)
			stranger, err := os.ReadFile(certificate) // for the key in the file
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(filepath.Join(v.dir, "gate.key")); err != nil {
				t.Fatal(err)
			}
			public := publicOf(t, uri)
			certifies := func() {
				t.Helper()
				serial++
				c := &x509.Certificate{SerialNumber: big.NewInt(serial), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
					ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
				der, err := x509.CreateCertificate(rand.Reader, c, v.ca.Certificate, public, v.ca.Key)
				if err != nil {
					t.Fatal(err)
				}
				writeFile(t, certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
			}
			config := v.config(uri, "seen/seen.db", more)
			if err := os.Mkdir(filepath.Join(v.dir, "seen"), 0o700); err != nil {
				t.Fatal(err)
			}
			path := writeFile(t, filepath.Join(v.dir, "gate.yaml"), []byte(config))
			if code, _, errs := call("", "gate", "check", "--config", path); code == 0 || !strings.Contains(errs, "is not for the key") {
				t.Errorf("another key's certificate: exit code %d: %s", code, errs)
			}
			certifies()
			if code, _, errs := call("", "gate", "check", "--config", path); code != 0 {
				t.Fatalf("check: exit code %d: %s", code, errs)
			}
			g := v.serve(t, "gate.yaml", config)
			n := 0
			action := func() string { n++; return signedFor(t, v.agent, n, gateBody) }
			one := action()
			v.answers(t, "an action", g, one, 200, v.agent.ID)
			v.answers(t, "again", g, one, 409, `"reason":"replay"`)

			// Each connection is a signature of the device.
			var wg sync.WaitGroup
			for range 8 {
				jws := action()
				wg.Go(func() { v.answers(t, "at once with others", g, jws, 200, v.agent.ID) })
			}
			wg.Wait()

			// A certificate that took its place is read at the next handshake.
			shown := func() (serial int64) {
				t.Helper()
				c, err := tls.Dial("tcp", g.Address, &tls.Config{RootCAs: v.ca.Roots, Certificates: []tls.Certificate{v.tls}})
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				return c.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
			}
			certifies()
			if got := shown(); got != serial {
				t.Errorf("certificate %d is shown after certificate %d took its place", got, serial)
			}
			writeFile(t, certificate, stranger)
			c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: v.ca.Roots, Certificates: []tls.Certificate{v.tls}}, DisableKeepAlives: true}}
			if res, err := c.Get("https://" + g.Address + "/"); err == nil {
				res.Body.Close()
				t.Error("another key's certificate is shown")
			}
			certifies()
			v.answers(t, "afterwards", g, action(), 200, v.agent.ID)
			if err := g.stop(); err != nil {
				t.Errorf("it ended so: %v", err)
			}
			g = v.serve(t, "gate.yaml", config)
			v.answers(t, "after a restart", g, one, 409, `"reason":"replay"`)
			v.answers(t, "a new one after a restart", g, action(), 200, v.agent.ID)
		})
	}
}
