package attest

import (
	"bytes"
	"fmt"
	"strings"
)

// pcrNames says what the PCRs of a PC client measure (TCG PC Client Platform
// Firmware Profile, section 3.3.4; the UAPI Group's Linux TPM PCR Registry).
var pcrNames = map[int]string{
	0: "firmware code", 1: "firmware configuration", 2: "option ROM code", 3: "option ROM configuration",
	4: "boot loader", 5: "boot loader configuration and partition table", 6: "platform specific", 7: "Secure Boot policy",
	8: "boot loader command line", 9: "boot loader files, initrd", 10: "Linux IMA", 11: "unified kernel image", 12: "kernel command line",
	13: "system extensions", 14: "shim keys", 15: "system identity",
}

// PCRName says in words what a PCR of a PC client measures.
func PCRName(index int) string {
	if n, ok := pcrNames[index]; ok {
		return n
	}
	return "not assigned"
}

// Differences says in words which PCRs differ from those of a policy.
func Differences(p ApprovedPolicy, values []PCRValue) string {
	var out []string
	for _, want := range p.PCRs {
		for _, v := range values {
			if v.Bank == want.Bank && v.Index == want.Index && !bytes.Equal(v.Digest, want.Digest) {
				out = append(out, fmt.Sprintf("PCR %d of bank %s (%s) is %x, policy %s approves %x", v.Index, v.Bank, PCRName(v.Index), v.Digest, p.Name, want.Digest))
			}
		}
	}
	if len(out) == 0 {
		return "values are missing"
	}
	return strings.Join(out, "; ")
}

// Matches says whether the values include all of the policy's.
func Matches(p ApprovedPolicy, values []PCRValue) bool {
	for _, want := range p.PCRs {
		found := false
		for _, v := range values {
			found = found || v.Bank == want.Bank && v.Index == want.Index && bytes.Equal(v.Digest, want.Digest)
		}
		if !found {
			return false
		}
	}
	return true
}
