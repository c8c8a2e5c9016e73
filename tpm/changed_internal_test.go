package tpm

import (
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
)

// measuring is a connection to a TPM on a host that measures all the time: right
// before a use of a policy session PCR 10 is extended, so many times.
type measuring struct {
	io.ReadWriteCloser
	before tpm2.TPMCC
	left   int
}

func (m *measuring) Write(b []byte) (int, error) {
	if m.left > 0 && tpm2.TPMCC(binary.BigEndian.Uint32(b[6:])) == m.before {
		m.left--
		if _, err := (tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: 10, Auth: tpm2.PasswordAuth(nil)},
			Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}}}).Execute(&link{rw: m.ReadWriteCloser, socket: true}); err != nil {
			return 0, err
		}
	}
	return m.ReadWriteCloser.Write(b)
}

// TestMeasuringHost: a PCR that no approval names is extended between the
// policy's look at the PCRs and the use of the key, as IMA does when a program is started.
func TestMeasuringHost(t *testing.T) {
	h := newReserveHost(t)
	if err := h.reserve(600, nil); err != nil {
		t.Fatal(err)
	}
	selection := []attest.PCRSelection{{Bank: "sha256", Indexes: []int{0, 7}}}
	policies := approvedNow(t, h.d, selection)
	auth, err := attest.KeyPolicy(attest.ModeLocal, policies.PolicyKey, policies.Ref)
	if err != nil {
		t.Fatal(err)
	}
	file, _, err := h.d.CreateKey(attest.KeyTemplate(auth))
	if err != nil {
		t.Fatal(err)
	}
	local, err := h.d.LoadKey(file, policies)
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := h.d.Seal([]byte("1234"), policies)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(nil)
	for _, c := range []struct {
		name   string
		before tpm2.TPMCC
		use    func() error
	}{
		{"a key in local mode", tpm2.TPMCCSign, func() error { _, err := local.Sign(nil, digest[:], crypto.SHA256); return err }},
		{"a key in reserve mode", tpm2.TPMCCSign, h.sign},
		{"a sealed secret", tpm2.TPMCCUnseal, func() error { _, err := h.d.Unseal(sealed, policies); return err }},
	} {
		for times, want := range map[int]error{0: nil, 1: nil, maxChanges - 1: nil, 1000: tpm2.TPMRCPCRChanged} {
			if err := c.use(); err != nil {
				t.Fatalf("%s, on a quiet host: %v", c.name, err)
			}
			m := &measuring{ReadWriteCloser: h.d.link.rw, before: c.before, left: times}
			h.d.link.rw = m
			if err := c.use(); !errors.Is(err, want) || (err == nil) != (want == nil) {
				t.Errorf("%s, PCR 10 extended %d times: %v, %v is expected", c.name, times, err, want)
			}
			if h.d.link.rw == m {
				h.d.link.rw = m.ReadWriteCloser
			}
		}
	}
}
