// Classes of code points, for the tokenizer. Unicode 16.0.
#include "dsv4.h"

// Runs of code points of one class, packed by tools/unicode_table.py, which explains the form.
static const char unicode_runs[] =
    "C$6G%&_$J$;I&8I&08&G&&F$%($1*#%,&&$.#^%$^&$I]$0Q$X$5<%$%D%U1$)*/$%2)%$-&#&O%&K-$M4$U8&W'*#8E("
    "((-$S($%$)$)$%BK&2/(D%I$M$$$-b*G$/Y/$A&%I$$9G$.(%X$(K**S/Z$H$R(0%*#(Y(*^$$O&*%$K$6`%$9BK,&C3("
    "J$#M%&?*'*W%&;&#./*C$*'*/B#2'&3*H$*(:'%$%*+&72'*W%&;&'&'&'*#&32'*+.#>/&#>H$:$H$+&C$&+&W%&;&'&"
    "3*G$&+&+*#_$/*H$'<;&+&?*'*W%&;&'&3*C$*'*+>+2'&3*H$#%7I$'&7.+&/.'&#&'.'.+.O$23.+&/*#:#Z$T$?4S$"
    "&+&[%&`$*C$&+&/>'&+*#*/*H$=%>#1$A&+&[%&G$&3*C$&+&/>':'&/*H$%+R$S$&+&K)&+&3$0/;6*L%#9&+&G%.`%&"
    "C$&#*;.#27&#&?:H$)'$P$G*2%^$$J$'T''&#&3&`%&#&[%*3&#&;&H$)/c&#]%)8R%#%$%$%0I$&O'2O%$I%&O'&A%8$"
    "U$T'`*G$7b*G$2(Y'&#6#*K($UL$&/*;&#&/*C(&/*C'&/*;&#&/*[$&C*&/*K+*+D$R%-`$H$8W-*7*%QP%(E%%H&(,K"
    ",,.B>W%F$W%(D$O%R$S$&+&'R$O-,%0)*H$9H$9M$-&#G$9C.>K(6W+J$[&&O$2O$2%,)J$Z&*3N$O(2G&:L$-I'Q&*)^"
    "*&S&*#G$9H$9=%8([&F)S,&)J$C%E$P$b(G$J*B1b).5J$-+G$R'(M$6K(*+@@+$^'6WE%*7*W'*7*?&#&#&#&[&*S)&;"
    "$%,-&;,1*7&-U$,(+&;($N$3b%'3&_(#`$$&*83%G$3$S$.E']$C'_$)%0%(I$$%,58%$%$%$1$M$(1450%$N)*3'0IV%"
    "X%M$T%P*W,Z%WQ%Z&`_&(b&$E0U?8E$61&'Y'&#6#*`)>#$X$`%F$;&;&;&;&;&;&;&;&`&](%X(H'I&$E.P$Y=H&b$#2"
    ")#C&F$:$5(.*,$W-*'(-$I.$16K(&W.&)2G$b&X'D$%b$]&$H$W&B#_$`&J$['_$`J$bZ<a*UTY%.^)D$W((UD$,b$G$*"
    "R%K)$I$$^/G$*8@^%E$(^/(M+*'&#&?V%W)0%.8/8O)0@W+B)J$9`%,%$-G$R'(Q'N$%U&.C+T$$#G$1)b$G$6&[)F$W$"
    "*H$)1^%,E,c%+(b$(5J$7*7*7F$;&;&K($Y$(0K2$)*H$9OWN$R$[%2C)RCD$WP$*G0Z';R$36O$$U$&3&#&'&'&O0D%a"
    "$KP$H%b**W)>%a&O$0b$H$8`$L'$M%$103&[32^$J$;I&8I&L$E..7*7*7*+.=$=T$)(O$&G&&K%&'&[$*W$J'K26-0T("
    "-E$F*C%*+$U$,%](U(%J3S&.C)_$#K&1`&/E$O%#B#5K(6W&&%Q'2?$6I(W6*H$9O'2O'2`'BO)N$%M$&[$&;&'&K$&[$"
    "&;&'.O)R$[I$F$W%J$?c%7&G(&C$V+7*#&O(&'.#*[%&%B_%(>_&BD$b(K%&'64Z%7-%I&6%a*`)2(*`$)X(2&'6?&+&S"
    "&*+2#C$=E$<S&'#U&+b&?$Y&24;D$W).=Y%*@N%6@J%>1P$<b,C,_)K)V$K)>8c'BH$9H$R&.3$^%B)a<]&%G(&'$('c$"
    "+_)C'G$&BC'/3X%W%0X'S%;Q%[%F$[+<0X&:F$O*($1%V$C&>H$9S)&H$/1BO'(%F$S+01$)G$&$%,$P%M$G%&S'81Z*;"
    "&#&/&[$&G$$8K*6H$9/&?*'*W%&;&'&3&G$*'*+*#:#6;*;.3N$G$&#*#&W'&G$&#*#&/&?($)@'V&K,4J$'$%1Z&W+$%"
    "BH$Y7W)*C$]%9J'C+,%N$H$9U$L%C*$8H$9P%Q&K&*[$2P$/=F:K*$P/`*K%Q$?*#*?&'&W&&'*C$,D$H$Y+?*W(*?$)N"
    "&[*@%BG,,%4T$C,>I$X9C'$X$H$9C$&S(&C$4H$T&-)Y&*W%&W$F,;&'&O(.#&'&C$BH$97&'&S'&'&7>H$YI$[%(<C%&"
    "C(.3T$J$&V-#_$T%S&T$%IV&Z/]0%5L$O;RL-C/(T$`H'c$W%J$KV26[K%FZ=`(G$Y[)CJ%>[&&H$1)^,&H$9W&*3$H$["
    ")D$1(H$H$%<%S%6K%cX$S(,J$Y;`*[%/T/K,2C*>C%c*'$)N$'Z$`b:BW^'F(G$_`E$/&;&'&KG$_$#V&+*#Z$/BOT$RC"
    ",K06S$.C$>G$*%)$aN2b@J$9QY$P,W(*[%F$Q1P*YAH$^'(Q*5,9B?(=X&1T*T%I+-$H2P%Q$P%Q$^-D$D&^3S-&[+&'*"
    "#*'*/&O$&#&;&C+&/*?&;&O&&/&3&#.;&OM$*C&$E&$^&$E&$^&$E&$^&$E&$^&$E&$A*H)`c$^)0I)@%X$%<]$3&[$cL"
    "'[&:7V=;&C%*;&'&36W*F'#c0S(.W$*H$1#$aJ$[&F%`(G$5%a]$`&G$Y=C'G$1%a_$;&/&'&[$&S;*D$>F(O,2H$1)DE"
    "&L*#.#2Q,T(#_$I;/&K&&'&#*#&G$&/&#&#:#2#&#&#&+&'&#*#&#&#&#&#&'&#*/&;&/&/&#&G$&C%6+&3&C%R))XD$Q"
    "(0Q/P$^$(^$$^$$U'H$T$C7a)U&T$Q(0E$<)X$9H6b^&0E%,U$,^10^.8Q$0%]$Q$0b)@I$8b'@Y&(Q$0)X*QM$P$Y$(U"
    "$,I$4b)<^$(M$8E$<M5$Q.J$YC'`_I(c&GJ3:W>*GS9Z$CI@_$WP%JW,WF%J`(KL66`N3cLaY%`@";

void unicode_classes(uint8_t cls[static N_CLASSES]) {
    size_t at = 0;
    int c = C_SPACE;
    for (const char *p = unicode_runs; *p;) {
        uint32_t run = 0, digit = 32;
        for (int shift = 0; digit & 32; shift += 5) {
            digit = (uint32_t)(*p - (*p > '\\' ? '$' : '#'));
            run |= (digit & 31) << shift;
            p++;
        }
        c = (c + 1 + (int)(run & 3)) % 5;
        for (uint32_t n = (run >> 2) + 1; n > 0; n--) cls[at++] = (uint8_t)c;
    }
}
