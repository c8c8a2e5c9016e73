package main

import (
	"crypto/ecdsa"
	"fmt"
)

// maxApprovals bounds how many approvals one command makes: the TPM's user tries
// them, and each stands in the issuer's list.
const maxApprovals = 20

// quorums returns the approvals that let any m of the approvers authorize, and
// their names: one for each group of m. The TPM knows no "m of n", but it takes
// any policy that the policy key approved. m of 0 demands all, in one approval.
func quorums(name string, approvers []*ecdsa.PublicKey, m int) (names []string, groups [][]*ecdsa.PublicKey, err error) {
	n := len(approvers)
	if m == 0 || m == n && n > 0 {
		return []string{name}, [][]*ecdsa.PublicKey{approvers}, nil
	}
	if m < 1 || m > n {
		return nil, nil, usage("--of %d: there are %d approvers", m, n)
	}
	for i, k := range approvers {
		for _, other := range approvers[:i] {
			if k.Equal(other) {
				return nil, nil, usage("--approver: a key stands twice, and would count for two")
			}
		}
	}
	group := make([]*ecdsa.PublicKey, 0, m)
	var choose func(from int)
	choose = func(from int) {
		if len(group) == m {
			groups = append(groups, append([]*ecdsa.PublicKey(nil), group...))
			return
		}
		for i := from; i <= n-(m-len(group)) && len(groups) <= maxApprovals; i++ {
			group = append(group, approvers[i])
			choose(i + 1)
			group = group[:len(group)-1]
		}
	}
	choose(0)
	if len(groups) > maxApprovals {
		return nil, nil, usage("--of %d of %d approvers makes more than %d approvals: choose fewer approvers", m, n, maxApprovals)
	}
	for i := range groups {
		names = append(names, fmt.Sprintf("%s.%d", name, i+1))
	}
	return names, groups, nil
}
