package tpm

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
)

// Errors of this package, for errors.Is. The messages that wrap them say what
// would be right.
var (
	ErrNoTPM         = errors.New("there is no TPM")
	ErrPermission    = errors.New("no permission to use the TPM")
	ErrTPM12         = errors.New("the TPM is a version 1.2, and 2.0 is needed")
	ErrLockout       = errors.New("the TPM is locked out after wrong authorizations")
	ErrHierarchyAuth = errors.New("the authorization of the TPM hierarchy is wrong")
	ErrForeignKey    = errors.New("the key belongs to another TPM")
	ErrDigestSize    = errors.New("the digest does not have the size of its hash")
	ErrNoPolicy      = errors.New("no approved policy is known for the key")
)

// PCRError: the PCRs have values that no approved policy has, so the TPM
// refuses the key.
type PCRError struct {
	Current  []attest.PCRValue
	Policies []attest.ApprovedPolicy
}

// Error says in words which PCRs differ, for the policy that differs least.
func (e *PCRError) Error() string {
	var best string
	for _, p := range e.Policies {
		if d := attest.Differences(p, e.Current); best == "" || strings.Count(d, ";") < strings.Count(best, ";") {
			best = d
		}
	}
	return "the host is not in an approved state: " + best
}

// explain turns a TPM's answer into an error of this package where there is
// one, with what would be right.
func explain(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, tpm2.TPMRCLockout):
		return fmt.Errorf("%s: %w: wait, or reset it with tpm2_dictionarylockout --clear-lockout", what, ErrLockout)
	case errors.Is(err, tpm2.TPMRCIntegrity):
		return fmt.Errorf("%s: %w: a key file works only with the TPM that made it; enrol this host anew", what, ErrForeignKey)
	case errors.Is(err, tpm2.TPMRCInitialize):
		return fmt.Errorf("%s: the TPM was not started: run tpm2_startup --clear: %w", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// explainHierarchy is explain for commands that a hierarchy authorizes.
func explainHierarchy(what string, err error) error {
	if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
		return fmt.Errorf("%s: %w: give its authorization value in a file", what, ErrHierarchyAuth)
	}
	return explain(what, err)
}

func explainOpen(address string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("opening %s: %w: see that the firmware has it enabled and the kernel a driver; /dev/tpmrm0 is its usual name", address, ErrNoTPM)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("opening %s: %w: add the user to the group tss", address, ErrPermission)
	}
	return fmt.Errorf("opening %s: %w", address, err)
}
