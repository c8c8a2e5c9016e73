package tpm_test

import (
	"crypto/ecdsa"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"inkan/attest"
	"inkan/tpm"
)

// approveEpoch approves the state that the host is in until an epoch ends.
func (h *host) approveEpoch(t testing.TB, name string, epoch uint64, approvers ...*approver) {
	t.Helper()
	values, err := h.dev.ReadPCRs(selection)
	if err != nil {
		t.Fatal(err)
	}
	var keys []*ecdsa.PublicKey
	for _, a := range approvers {
		keys = append(keys, &a.key.PublicKey)
	}
	p, err := attest.SignEpochPolicy(h.key, name, values, h.policies.Ref, epoch, keys...)
	if err != nil {
		t.Fatal(err)
	}
	c := *h.policies
	c.Approved = append([]attest.ApprovedPolicy{*p}, c.Approved...)
	h.policies = &c
}

// epochKey makes a key that works under approvals with an epoch alone.
func (h *host) epochKey(t testing.TB, mode string) *tpm.Key {
	t.Helper()
	auth, err := attest.EpochKeyPolicy(mode, h.policies.PolicyKey, h.policies.Ref)
	if err != nil {
		t.Fatal(err)
	}
	file, _, err := h.dev.CreateKey(attest.KeyTemplate(auth))
	if err != nil {
		t.Fatal(err)
	}
	k, err := h.dev.LoadKey(file, h.policies)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (h *host) epoch(t testing.TB, n uint64) uint64 {
	t.Helper()
	v, err := h.dev.Epoch(n)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestEpochRetiresLocalApprovals(t *testing.T) {
	h := newHost(t)
	n := h.epoch(t, 1)
	if again := h.epoch(t, n); again != n {
		t.Fatalf("epoch %d, then %d", n, again)
	}
	k := h.epochKey(t, attest.ModeLocal)
	if err := signs(k); !errors.Is(err, tpm.ErrNoPolicy) {
		t.Fatalf("under an approval without an epoch: %v", err)
	}
	h.approveEpoch(t, "one", n)
	k.SetPolicies(h.policies)
	for range 3 {
		if err := signs(k); err != nil {
			t.Fatal(err)
		}
	}
	h.epoch(t, n+1)
	var ended *tpm.EpochError
	if err := signs(k); !errors.As(err, &ended) || ended.Current != n+1 || ended.Last != n {
		t.Fatalf("after the epoch: %v", err)
	}
	h.approveEpoch(t, "two", n+1)
	k.SetPolicies(h.policies)
	for range 2 {
		if err := signs(k); err != nil {
			t.Fatalf("after the new approval: %v", err)
		}
	}
	plain, _ := h.newKey(t)
	if err := signs(plain); err != nil {
		t.Errorf("a key without epochs: %v", err)
	}
}

// TestEpochRetiresApprover: the old approver's authorizations are of no use
// after the increment; key and sessions stay.
func TestEpochRetiresApprover(t *testing.T) {
	h := newHost(t)
	old, fresh := newApprover(t, h), newApprover(t, h)
	n := h.epoch(t, 1)
	h.approveEpoch(t, "old", n, old)
	k := h.epochKey(t, attest.ModeApprover)
	if k.Mode() != attest.ModeApprover {
		t.Fatalf("mode %s", k.Mode())
	}
	for range 2 {
		if err := approved(k, "x", nil, old); err != nil {
			t.Fatal(err)
		}
	}
	h.approveEpoch(t, "fresh", n+1, fresh)
	k.SetPolicies(h.policies)
	for _, a := range []*approver{old, fresh} { // both serve until the increment
		if err := approved(k, "x", nil, a); err != nil {
			t.Fatal(err)
		}
	}
	if err := approved(k, "x", nil, old); err != nil { // so that it is the last one used
		t.Fatal(err)
	}
	h.epoch(t, n+1)
	var ended *tpm.EpochError
	if err := approved(k, "x", nil, old); !errors.As(err, &ended) {
		t.Fatalf("the old approver after the increment: %v", err)
	}
	for range 2 {
		if err := approved(k, "x", nil, fresh); err != nil {
			t.Fatalf("the fresh one: %v", err)
		}
	}
	for range 10 { // each refusal costs a session that was begun
		if err := approved(k, "x", nil, old); err == nil {
			t.Fatal("signed under the old approver")
		}
	}
	time.Sleep(300 * time.Millisecond) // idle by now: the device has left the TPM
	if n := leftOver(t, h); n != 0 {
		t.Errorf("%d handles and sessions are left in the TPM", n)
	}
}

// TestEpochIsCertified: the issuer believes what the AK signs of it.
func TestEpochIsCertified(t *testing.T) {
	h := newHost(t)
	n := h.epoch(t, 1)
	got, err := h.dev.CertifyEpoch([]byte("qualifying"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := tpm2.Unmarshal[tpm2.TPMSAttest](got.Attest)
	if err != nil {
		t.Fatal(err)
	}
	info, err := s.Attested.NV()
	if err != nil || string(info.IndexName.Buffer) != string(attest.EpochName()) || string(info.NVContents.Buffer) != string(attest.EpochOperand(n)) {
		t.Errorf("certified %+v: %v", info, err)
	}
}

// TestEpochCannotGoBack: root undefines the counter and makes it again, clears
// the TPM's owner, or puts something else in its place.
func TestEpochCannotGoBack(t *testing.T) {
	h := newHost(t)
	n := h.epoch(t, 1)
	n = h.epoch(t, n+2)
	h.approveEpoch(t, "now", n)
	k := h.epochKey(t, attest.ModeLocal)
	if err := signs(k); err != nil {
		t.Fatal(err)
	}
	undefine := func() {
		t.Helper()
		h.dev.Release()
		link, err := linuxudstpm.Open(h.sim.Address)
		if err != nil {
			t.Fatal(err)
		}
		defer link.Close()
		if _, err := (tpm2.NVUndefineSpace{AuthHandle: tpm2.TPMRHOwner, NVIndex: tpm2.NamedHandle{Handle: attest.EpochIndex, Name: tpm2.TPM2BName{Buffer: attest.EpochName()}}}).Execute(link); err != nil {
			t.Fatal(err)
		}
	}
	undefine()
	if err := signs(k); !errors.Is(err, tpm.ErrNoEpoch) {
		t.Errorf("without the counter: %v", err)
	}
	if again := h.epoch(t, 1); again <= n {
		t.Fatalf("made again it has %d, it had %d", again, n)
	}
	var ended *tpm.EpochError
	if err := signs(k); !errors.As(err, &ended) {
		t.Errorf("with a counter that was made again: %v", err)
	}
	// An index that can be written at will, in its place: another Name.
	undefine()
	h.dev.Release()
	link, err := linuxudstpm.Open(h.sim.Address)
	if err != nil {
		t.Fatal(err)
	}
	ordinary := attest.EpochPublic(false)
	ordinary.Attributes.NT = tpm2.TPMNTOrdinary
	if _, err := (tpm2.NVDefineSpace{AuthHandle: tpm2.TPMRHOwner, PublicInfo: tpm2.New2B(*ordinary)}).Execute(link); err != nil {
		t.Fatal(err)
	}
	name, err := tpm2.NVName(ordinary)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (tpm2.NVWrite{AuthHandle: tpm2.TPMRHOwner, NVIndex: tpm2.NamedHandle{Handle: attest.EpochIndex, Name: *name}, Data: tpm2.TPM2BMaxNVBuffer{Buffer: attest.EpochOperand(n)}}).Execute(link); err != nil {
		t.Fatal(err)
	}
	if err := link.Close(); err != nil {
		t.Fatal(err)
	}
	if err := signs(k); err == nil {
		t.Error("signed with an index that root wrote")
	}
	if _, err := h.dev.Epoch(1); err == nil || !strings.Contains(err.Error(), "another program") {
		t.Errorf("the counter in another's place: %v", err)
	}
}

func TestEpochStepsAreBounded(t *testing.T) {
	h := newHost(t)
	n := h.epoch(t, 1)
	if _, err := h.dev.Epoch(n + 1000); err == nil || !strings.Contains(err.Error(), "at most 64 steps") {
		t.Errorf("a thousand steps: %v", err)
	}
	if again := h.epoch(t, 1); again != n {
		t.Errorf("and the counter went from %d to %d", n, again)
	}
}
