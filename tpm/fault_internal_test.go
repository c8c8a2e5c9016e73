package tpm

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
	"inkan/simulator"
)

// faulty is a connection that answers one command with an error of the TPM
// (before it took effect), or loses the answer of one (after it did).
type faulty struct {
	io.ReadWriteCloser
	left  *int // commands until the fault
	after bool
	fail  bool
}

var errFault = errors.New("injected fault")

func (f *faulty) Write(b []byte) (int, error) {
	*f.left--
	if *f.left == 0 && !f.after {
		return 0, errFault
	}
	f.fail = *f.left == 0
	return f.ReadWriteCloser.Write(b)
}

func (f *faulty) Read(b []byte) (int, error) {
	n, err := f.ReadWriteCloser.Read(b)
	if f.fail {
		return 0, errFault
	}
	return n, err
}

// count returns how many handles and sessions are in the TPM.
func (d *Device) count(t *testing.T) int {
	t.Helper()
	total := 0
	err := d.do("counting", func() error {
		total = 0
		for _, kind := range []uint32{transients, loadedSessions, savedSessions} {
			list, err := d.handles(kind)
			if err != nil {
				return err
			}
			total += len(list)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return total
}

// approvedNow has the state of the TPM approved by a key made for it.
func approvedNow(t *testing.T, d *Device, selection []attest.PCRSelection) *Policies {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	area, err := attest.PolicyKeyPublic(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	values, err := d.ReadPCRs(selection)
	if err != nil {
		t.Fatal(err)
	}
	p, err := attest.SignPolicy(key, "now", values, []byte("test"))
	if err != nil {
		t.Fatal(err)
	}
	return &Policies{PolicyKey: area, Ref: []byte("test"), Approved: []attest.ApprovedPolicy{*p}}
}

// TestNothingIsLeaked lets every command of every operation fail, before or
// after it took effect. Afterwards nothing is left in the TPM but what is kept
// on purpose, and the next use works.
func TestNothingIsLeaked(t *testing.T) {
	sim := simulator.TPMForTest(t)
	d, err := Open(sim.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	selection := []attest.PCRSelection{{Bank: "sha256", Indexes: []int{0, 7}}}
	file, _, err := d.CreateKey(SigningTemplate())
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(nil)
	policies := approvedNow(t, d, selection)
	sealed, err := d.Seal([]byte("1234"), policies)
	if err != nil {
		t.Fatal(err)
	}
	operations := map[string]func() error{
		"CreateKey": func() error { _, _, err := d.CreateKey(SigningTemplate()); return err },
		"LoadKey":   func() error { _, err := d.LoadKey(file, nil); return err },
		"Sign": func() error {
			k, err := d.LoadKey(file, nil)
			if err != nil {
				return err
			}
			_, err = k.Sign(nil, digest[:], crypto.SHA256)
			return err
		},
		"Certify": func() error {
			k, err := d.LoadKey(file, nil)
			if err != nil {
				return err
			}
			_, err = d.Certify(k, []byte("x"))
			return err
		},
		"Quote":    func() error { _, err := d.Quote(selection, []byte("x")); return err },
		"ReadPCRs": func() error { _, err := d.ReadPCRs(selection); return err },
		"EKs":      func() error { _, err := d.EKs(); return err },
		"Seal":     func() error { _, err := d.Seal([]byte("1234"), policies); return err },
		"Unseal":   func() error { _, err := d.Unseal(sealed, policies); return err },
	}
	for name, operation := range operations {
		for _, after := range []bool{false, true} {
			for n := 1; n < 60; n++ {
				d.Release()
				if left := d.count(t); left != 0 {
					t.Fatalf("%s: %d handles are left before the test", name, left)
				}
				counter := n
				err := d.do("connecting", func() error {
					d.link.rw = &faulty{ReadWriteCloser: d.link.rw, left: &counter, after: after}
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
				if err := operation(); err != nil {
					t.Errorf("%s, command %d failing (after it took effect: %v): no second try: %v", name, n, after, err)
				}
				d.Release()
				if left := d.count(t); left != 0 {
					t.Fatalf("%s, command %d failing (after it took effect: %v): %d handles are left", name, n, after, left)
				}
				if counter > 0 {
					break // the operation has fewer commands
				}
			}
		}
	}
}

// TestErrorsOfTheTPM: a command that the TPM refuses leaves nothing behind.
func TestErrorsOfTheTPM(t *testing.T) {
	sim := simulator.TPMForTest(t)
	d, err := Open(sim.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	bad, err := attest.PCRPolicy([]attest.PCRValue{{Bank: "sha256", Index: 7, Digest: make([]byte, 32)}})
	if err != nil {
		t.Fatal(err)
	}
	file, _, err := d.CreateKey(attest.KeyTemplate(bad))
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(nil)
	for range 8 { // more than a TPM has places for
		k, err := d.LoadKey(file, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := k.Sign(nil, digest[:], crypto.SHA256); err == nil {
			t.Fatal("a key with a policy signed without it")
		}
		if _, err := d.Certify(k, make([]byte, 200)); err == nil {
			t.Fatal("too long qualifying data were taken")
		}
	}
	d.Release()
	if left := d.count(t); left != 0 {
		t.Errorf("%d handles are left", left)
	}
}

// TestResponsesThatLie: a TPM whose responses do not have the form is an error.
func TestResponsesThatLie(t *testing.T) {
	for name, response := range map[string][]byte{
		"too short":        {0x80, 0x01, 0, 0, 0, 5, 0, 0, 0, 0},
		"too long":         binary.BigEndian.AppendUint32([]byte{0x80, 0x01}, 1<<30),
		"longer than sent": {0x80, 0x01, 0, 0, 0, 10, 0, 0, 0, 0, 1, 2, 3},
	} {
		l := &link{address: "none", rw: &canned{append(response, make([]byte, max(0, 10-len(response)))...)}}
		if _, err := l.Send([]byte{0}); !errors.Is(err, errLink) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type canned struct{ response []byte }

func (c *canned) Write(b []byte) (int, error) { return len(b), nil }
func (c *canned) Read(b []byte) (int, error)  { return copy(b, c.response), nil }
func (c *canned) Close() error                { return nil }

// TestExplain: errors that a TPM of a test does not show on demand.
func TestExplain(t *testing.T) {
	for want, err := range map[error]error{
		ErrPermission:    explainOpen("/dev/tpmrm0", fs.ErrPermission),
		ErrNoTPM:         explainOpen("/dev/tpmrm0", fs.ErrNotExist),
		ErrLockout:       explain("signing", tpm2.TPMRCLockout),
		ErrForeignKey:    explain("loading", tpm2.TPMRCIntegrity),
		ErrHierarchyAuth: explainHierarchy("creating", tpm2.TPMRCBadAuth),
	} {
		if !errors.Is(err, want) || len(err.Error()) < len(want.Error())+10 {
			t.Errorf("got %v, want %v and what would be right", err, want)
		}
	}
}
