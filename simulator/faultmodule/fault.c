/* A PKCS#11 module for tests: it passes every call on to the real module that
 * $INKAN_FAULT_MODULE names, and does harm where the file that
 * $INKAN_FAULT_CONTROL names tells it to. The file's one line is
 *
 *     CALL FAULT [ARGUMENT]
 *
 * with CALL one of C_SignInit, C_Sign, C_FindObjectsInit, C_GetAttributeValue,
 * C_OpenSession, C_Login, C_GenerateKeyPair, and FAULT one of
 *
 *     hang            never returns
 *     crash           abort()
 *     rv CODE         returns that CKR value
 *     slow MS         waits, then goes on
 *     wrong           (C_Sign) flips a bit of the signature
 *     sessions        closes all sessions, then goes on
 *     other HEX       (C_SignInit) uses the private key with that CKA_ID
 *
 * A FAULT with a ! before it happens once: the file is removed. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pkcs11go.h"

static CK_FUNCTION_LIST faulty;
static CK_FUNCTION_LIST_PTR real;

/* take reads what harm is to be done in a call, if any. */
static const char *take(const char *call, char *fault, char *arg) {
	const char *path = getenv("INKAN_FAULT_CONTROL");
	char name[64] = "", text[64] = "";
	arg[0] = 0;
	FILE *f = path ? fopen(path, "r") : NULL;
	if (!f) return NULL;
	int n = fscanf(f, "%63s %63s %63s", name, text, arg);
	fclose(f);
	if (n < 2 || strcmp(name, call)) return NULL;
	if (text[0] == '!') {
		if (unlink(path)) return NULL; /* another thread was first */
		strcpy(fault, text + 1);
	} else strcpy(fault, text);
	return fault;
}

/* harm returns 1 with *rv set where the call must end here. */
static int harm(const char *call, CK_RV *rv, char *fault, char *arg) {
	fault[0] = 0;
	if (!take(call, fault, arg)) return 0;
	if (!strcmp(fault, "hang")) for (;;) pause();
	if (!strcmp(fault, "crash")) abort();
	if (!strcmp(fault, "slow")) usleep(1000 * atoi(arg));
	if (!strcmp(fault, "rv")) { *rv = strtoul(arg, NULL, 0); return 1; }
	if (!strcmp(fault, "sessions")) {
		CK_ULONG n = 16;
		CK_SLOT_ID slots[16];
		if (real->C_GetSlotList(1, slots, &n) == CKR_OK)
			for (CK_ULONG i = 0; i < n; i++) real->C_CloseAllSessions(slots[i]);
	}
	return 0;
}

#define WRAP(name, params, args) \
	static CK_RV x##name params { \
		char fault[64], arg[64]; CK_RV rv; \
		if (harm(#name, &rv, fault, arg)) return rv; \
		return real->name args; \
	}

WRAP(C_FindObjectsInit, (CK_SESSION_HANDLE s, CK_ATTRIBUTE_PTR t, CK_ULONG n), (s, t, n))
WRAP(C_GetAttributeValue, (CK_SESSION_HANDLE s, CK_OBJECT_HANDLE o, CK_ATTRIBUTE_PTR t, CK_ULONG n), (s, o, t, n))
WRAP(C_OpenSession, (CK_SLOT_ID i, CK_FLAGS f, CK_VOID_PTR a, CK_NOTIFY c, CK_SESSION_HANDLE_PTR s), (i, f, a, c, s))
WRAP(C_Login, (CK_SESSION_HANDLE s, CK_USER_TYPE u, CK_UTF8CHAR_PTR p, CK_ULONG n), (s, u, p, n))
WRAP(C_GenerateKeyPair, (CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_ATTRIBUTE_PTR a, CK_ULONG x, CK_ATTRIBUTE_PTR b, CK_ULONG y, CK_OBJECT_HANDLE_PTR p, CK_OBJECT_HANDLE_PTR q), (s, m, a, x, b, y, p, q))

static CK_RV xC_SignInit(CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_OBJECT_HANDLE k) {
	char fault[64], arg[64];
	CK_RV rv;
	if (harm("C_SignInit", &rv, fault, arg)) return rv;
	if (!strcmp(fault, "other")) {
		CK_OBJECT_CLASS class = CKO_PRIVATE_KEY;
		CK_BYTE id[32];
		CK_ULONG n = strlen(arg) / 2;
		for (CK_ULONG i = 0; i < n; i++) { unsigned b; sscanf(arg + 2 * i, "%2x", &b); id[i] = b; }
		CK_ATTRIBUTE t[2] = {{CKA_CLASS, &class, sizeof class}, {CKA_ID, id, n}};
		if (real->C_FindObjectsInit(s, t, 2) == CKR_OK) {
			real->C_FindObjects(s, &k, 1, &n);
			real->C_FindObjectsFinal(s);
		}
	}
	return real->C_SignInit(s, m, k);
}

static CK_RV xC_Sign(CK_SESSION_HANDLE s, CK_BYTE_PTR d, CK_ULONG n, CK_BYTE_PTR sig, CK_ULONG_PTR len) {
	char fault[64], arg[64];
	CK_RV rv;
	if (!sig) return real->C_Sign(s, d, n, sig, len); /* asks for the length only */
	if (harm("C_Sign", &rv, fault, arg)) {
		real->C_Sign(s, d, n, sig, len); /* an error ends the operation (PKCS#11 v2.40, section 5.11) */
		memset(sig, 0, *len);
		return rv;
	}
	rv = real->C_Sign(s, d, n, sig, len);
	if (rv == CKR_OK && sig && !strcmp(fault, "wrong")) sig[*len - 1] ^= 1;
	return rv;
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR out) {
	if (!real) {
		const char *path = getenv("INKAN_FAULT_MODULE");
		void *lib = path ? dlopen(path, RTLD_NOW) : NULL;
		CK_RV (*get)(CK_FUNCTION_LIST_PTR_PTR) = lib ? (CK_RV (*)(CK_FUNCTION_LIST_PTR_PTR))dlsym(lib, "C_GetFunctionList") : NULL;
		if (!get || get(&real) != CKR_OK) return CKR_GENERAL_ERROR;
		faulty = *real;
		faulty.C_FindObjectsInit = xC_FindObjectsInit;
		faulty.C_GetAttributeValue = xC_GetAttributeValue;
		faulty.C_OpenSession = xC_OpenSession;
		faulty.C_Login = xC_Login;
		faulty.C_GenerateKeyPair = xC_GenerateKeyPair;
		faulty.C_SignInit = xC_SignInit;
		faulty.C_Sign = xC_Sign;
	}
	*out = &faulty;
	return CKR_OK;
}
